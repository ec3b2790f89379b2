"""What a setting is: a variable's name, what it does, how it is read; and a group of them, which is a dataclass."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from planner.errors import InvalidInput

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
_VARIABLE = "variable"
#: Of an address, what stands before its host; and the values of its query that are nobody's business.
_USER = re.compile(r"(?<=://).*@")
_SECRETS = re.compile(r"(?<=password=)[^&]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A variable of the environment."""

    name: str
    #: Takes its text, never empty; raises ValueError("a number above 0") where that can't be.
    parse: Callable[[str], Any]
    #: What it does, in a line.
    what: str
    #: Who reads it: "all", "node", "workers", "API" or "client".
    roles: str | None = None
    #: For people: "15.0", "the host's name".
    default: str = ""
    #: Whether it is never shown.
    secret: bool = False
    #: Whether `<name>_FILE` may name a file that holds it.
    file: bool = False

    def read(self, env: Mapping[str, str]) -> tuple[Any, str]:
        """The value and where it comes from: "environment" or a file; (None, "default") where it is unset or empty.

        Raises:
            InvalidInput: If it is not what it must be; the message names the variable and what is expected.
        """
        written, whence = env.get(self.name, "").strip(), "environment"
        place = env.get(f"{self.name}_FILE", "").strip() if self.file and not written else ""
        try:
            if place:
                whence, written = place, _content(place)
            if not written:
                return None, "default"
            if len(written) > 1 and written[0] == written[-1] and written[0] in "'\"":
                raise ValueError("written without quotes around it")
            return self.parse(written), whence
        except ValueError as error:
            raise InvalidInput(
                f"{self.name} must be {error}, got {self.shown(written)!r}"
                if written
                else f"{self.name}_FILE must be the path of a file that can be read, got {place!r}: {error}",
                details={"setting": self.name},
            ) from None

    def shown(self, value: object) -> str:
        """`value` as it may be shown: no secret, and no password within an address."""
        if self.secret:
            return "***"
        shown = _plain(value)
        head, sign, rest = shown.partition("://")
        if sign and rest.startswith(":") and "@" not in rest:  # a password without the host that belongs behind it
            return f"{head}://***"
        return _SECRETS.sub("***", _USER.sub("***@", shown))


def _plain(value: object) -> str:
    """A value as it is written in the environment."""
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    if isinstance(value, (bool, float)) and value == int(value):
        value = int(value)
    return "" if value is None else str(value)


def _content(place: str) -> str:
    try:
        return Path(place).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


def setting(
    name: str,
    parse: Callable[[str], T],
    default: T,
    what: str,
    *,
    shown: str | None = None,
    roles: str | None = None,
    secret: bool = False,
    file: bool = False,
) -> T:
    """A field of a `Group`: the variable `name`, read by `parse`; else as `Variable`."""
    shown = _plain(default) if shown is None else shown
    variable = Variable(name=name, parse=parse, what=what, default=shown, roles=roles, secret=secret, file=file)
    return field(default=default, metadata={_VARIABLE: variable})


def computed(
    name: str, parse: Callable[[str], T], default: Callable[[], T], what: str, *, shown: str, roles: str | None = None
) -> T:
    """As `setting`; what `default` yields is found out when it is needed, and called `shown`."""
    variable = Variable(name=name, parse=parse, what=what, default=shown, roles=roles)
    return field(default_factory=default, metadata={_VARIABLE: variable})


class Group:
    """Settings that belong together: a subclass is a frozen dataclass, its fields made by `setting` or `computed`."""

    __slots__ = ()
    #: Who reads them, unless one says so itself.
    roles: ClassVar[str] = "all"

    @classmethod
    def variables(cls) -> dict[str, Variable]:
        """The variable of each field."""
        made = cast("type[DataclassInstance]", cls)
        return {f.name: replace(v, roles=v.roles or cls.roles) for f in fields(made) for v in f.metadata.values()}

    @classmethod
    def found(cls, env: Mapping[str, str]) -> dict[str, Any]:
        """The fields that `env` sets.

        Raises:
            InvalidInput: If one does not parse.
        """
        values = {name: variable.read(env)[0] for name, variable in cls.variables().items()}
        found = {name: value for name, value in values.items() if value is not None}
        cls.complete(found, env)
        return found

    @classmethod
    def complete(cls, found: dict[str, Any], env: Mapping[str, str]) -> None:
        """Add to what was `found` the defaults that follow from other variables."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Self:
        """Read the settings, by default from this process' environment.

        Raises:
            InvalidInput: If a variable does not parse; the message names it.
        """
        return cls(**cls.found(os.environ if env is None else env))
