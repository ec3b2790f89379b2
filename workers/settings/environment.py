"""The whole environment: checked before a role starts, shown by `fairshard config`, handed to child processes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from planner.errors import InvalidInput
from workers.settings.groups import ClientSettings, HubSettings, QueueSettings, Settings, WebSettings
from workers.settings.running import RunSettings
from workers.settings.variables import Variable

_GROUPS = (Settings, HubSettings, QueueSettings, RunSettings, WebSettings, ClientSettings)
#: Not ours to read: docker-compose.yml's, which honcho hands on from the same .env.
_OTHERS = frozenset({"FAIRSHARD_PORT"})
_TESTS = "FAIRSHARD_TEST_"


def variables() -> dict[str, Variable]:
    """All settings by their names."""
    return {variable.name: variable for group in _GROUPS for variable in group.variables().values()}


def _unknown(env: Mapping[str, str]) -> Iterator[InvalidInput]:
    known = variables()
    names = known.keys() | {f"{v.name}_FILE" for v in known.values() if v.file} | _OTHERS
    for name in sorted(env.keys() - names):
        if name.startswith("FAIRSHARD_") and not name.startswith(_TESTS):
            near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.75)
            hint = f"did you mean {near[0]}?" if near else "`fairshard config` lists the settings"
            yield InvalidInput(f"there is no setting {name}: {hint}", details={"setting": name})


def check_environment(env: Mapping[str, str] | None = None) -> None:
    """Check every setting, so that a role with a wrong one doesn't start.

    Raises:
        InvalidInput: If a variable does not parse, or there is no setting of a FAIRSHARD_... name.
    """
    env = os.environ if env is None else env
    for error in _unknown(env):
        raise error
    for group in _GROUPS:
        group.from_env(env)


def settings_in_force(env: Mapping[str, str] | None = None) -> tuple[list[dict[str, Any]], list[InvalidInput]]:
    """Every setting as it is in force here, and what is wrong.

    Returns:
        `{name, value, whence, default, what, roles, error}` of each, secrets masked; and the errors.
    """
    env = os.environ if env is None else env
    rows, errors = [], list(_unknown(env))
    for variable in variables().values():
        error = None
        try:
            value, whence = variable.read(env)
        except InvalidInput as wrong:
            value, whence, error = env.get(variable.name), "environment", str(wrong)
            errors.append(wrong)
        rows.append(
            {
                "name": variable.name,
                "value": variable.default if value is None else variable.shown(value),
                "whence": whence,
                "default": variable.default,
                "what": variable.what,
                "roles": variable.roles,
                "error": error,
            }
        )
    return rows, errors


def child_env(changes: Mapping[str, str], *, without: Collection[str] = ()) -> dict[str, str]:
    """The environment for a process that this one starts: its own, less `without`, with `changes`."""
    return {name: value for name, value in os.environ.items() if name not in without} | dict(changes)


def completing() -> bool:
    """Whether the shell asks how the command line may go on; argcomplete's own variable."""
    return "_ARGCOMPLETE" in os.environ
