"""marshmallow fields that only HTTP bodies need; the rest are those of `planner.wire.fields`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from marshmallow import Schema, ValidationError, fields

from planner.errors import InvalidInput
from planner.names import (
    FOLDER,
    MOST_REVISION,
    MOST_SUBFOLDER,
    MOST_VARIANT,
    REVISION,
    VARIANT,
    check_asked_name,
    check_model_name,
    check_revision,
    check_subfolder,
    check_variant,
)
from planner.wire.fields import Integer, explain, shown

_PART = "[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"


class Checked(fields.Field[str]):
    """A string that one of `planner.names`' checks accepts."""

    check: Callable[[object], str]
    #: For the document, in JSON Schema: exactly what the check accepts.
    rule: ClassVar[dict[str, Any]] = {}

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> str:
        try:
            return type(self).check(value)
        except InvalidInput as error:
            raise ValidationError(str(error).partition(" ")[2]) from None  # the path names the field


class RepoId(Checked):
    """`owner/name`."""

    check = staticmethod(check_model_name)
    rule: ClassVar[dict[str, Any]] = {
        "pattern": f"^{_PART}/{_PART}$",
        "maxLength": 193,
        "not": {"pattern": r"--|\.\.|\.git$"},
    }


class ModelName(RepoId):
    """`owner/name`, or a name that the Hub resolves without its owner (`gpt2`)."""

    check = staticmethod(check_asked_name)
    rule: ClassVar[dict[str, Any]] = RepoId.rule | {"pattern": f"^{_PART}(/{_PART})?$"}


class Revision(Checked):
    """A branch, tag or commit."""

    check = staticmethod(check_revision)
    rule: ClassVar[dict[str, Any]] = {
        "pattern": f"^{REVISION}$",
        "minLength": 1,
        "maxLength": MOST_REVISION,
        "not": {"pattern": r"\.\.|//"},
    }


class Subfolder(Checked):
    """A folder of a repository."""

    check = staticmethod(check_subfolder)
    rule: ClassVar[dict[str, Any]] = {
        "pattern": f"^{FOLDER}$",
        "maxLength": MOST_SUBFOLDER,
        "not": {"pattern": r"\.\."},
    }


class Variant(Checked):
    """Which of several weights."""

    check = staticmethod(check_variant)
    rule: ClassVar[dict[str, Any]] = {"pattern": f"^{VARIANT}$", "maxLength": MOST_VARIANT}


class Timestamp(fields.Field[Any]):
    """When the caller sent it: seconds since 1970 (as williw clients send it) or text; it decides nothing."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> Any:
        if (type(value) in (int, float) and abs(value) <= 1e15) or (type(value) is str and len(value) <= 64):
            return value
        raise ValidationError(f"must be seconds since 1970 or text of at most 64 characters, got {shown(value)}")


class Replicas(Integer):
    """How many chains: a whole number, or `auto`."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if value == "auto" and type(value) is str:
            return value
        try:
            return super()._deserialize(value, *args, **kwargs)
        except ValidationError as error:
            raise ValidationError(str(error.messages[0]).replace("must be", "must be auto or", 1)) from None


class Either(fields.Field[Any]):
    """An object of `schema`, or one of a few plain values that stand for a whole object."""

    def __init__(self, schema: type[Schema], *, plain: Mapping[Any, Any], says: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.schema, self.plain, self.says = schema, plain, says

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> Any:
        if isinstance(value, dict):
            return self.schema().load(value)
        for key, meant in self.plain.items():
            if type(value) is type(key) and value == key:
                return meant
        raise ValidationError(f"must be {self.says} or an object, got {shown(value)}")


class Model(fields.Field[Any]):
    """A model's name, or an object of a request's fields; a wrong one is `{model_name, refused: why}`.

    So one that is refused does not stop those beside it.
    """

    def __init__(self, schema: type[Schema], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.schema = schema

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> Any:
        entry = value if isinstance(value, dict) else {"model_name": value}
        try:
            return self.schema().load(entry)
        except ValidationError as error:
            name, why = str(entry.get("model_name"))[:200], explain(error.messages, what="entry")[0]
            return {"model_name": name, "refused": why}
