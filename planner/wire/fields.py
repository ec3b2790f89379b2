"""marshmallow fields that say what they expect and what they got, and errors with the path of the bad field."""
# ruff: noqa: ARG002  (the signature of `_deserialize` is marshmallow's)

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

from marshmallow import EXCLUDE, Schema, ValidationError, fields, missing, post_load, validate
from marshmallow.exceptions import SCHEMA

from planner.errors import InvalidInput
from planner.limits import MAX_BYTES, MAX_QUANTITY, MAX_SECONDS
from planner.names import check_node_id

#: marshmallow's own messages in this house's words; they follow the field's path.
_WORDS = {
    "Missing data for required field.": "is required",
    "Field may not be null.": "must not be null",
    "Unknown field.": "is not a known field",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def shown(value: object) -> str:
    """`value` for an error message: on one line, at most 60 characters."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return f"a number of {value.bit_length()} bits"  # printing it may take longer than Python allows
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Number(fields.Field[float]):
    """A finite number from `low` to `high`; true and false are none, though Python says so."""

    def __init__(
        self, *, low: float = 0.0, high: float = MAX_QUANTITY, positive: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.low, self.high, self.positive = low, high, positive

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> float:
        if (
            type(value) in (int, float)
            and self.low <= value <= self.high  # false for NaN
            and not (self.positive and value == 0)
        ):
            return float(value)
        lowest = "above 0" if self.positive else f"from {self.low:g}"
        raise ValidationError(f"must be a number {lowest} to {self.high:g}, got {shown(value)}")


class Integer(fields.Field[int]):
    """A whole number from `low` to `high`; 24e9 is one, though JSON and YAML write it as a float."""

    def __init__(self, *, low: int = 0, high: int = MAX_BYTES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.low, self.high = low, high

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> int:
        if type(value) is float and math.isfinite(value) and value.is_integer():
            value = int(value)
        if type(value) is int and self.low <= value <= self.high:
            return value
        raise ValidationError(f"must be a whole number from {self.low:,} to {self.high:,}, got {shown(value)}")


class Text(fields.Field[str]):
    """A string of 1 to `longest` characters without control characters; one of `choices` if there are any."""

    def __init__(self, *, longest: int = 512, choices: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.longest, self.choices = longest, choices

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> str:
        if self.choices:
            if type(value) is str and value in self.choices:
                return value
            raise ValidationError(f"must be one of {', '.join(self.choices)}, got {shown(value)}")
        if type(value) is str and 0 < len(value) <= self.longest and not _CONTROL.search(value):
            return value
        what = f"a string of {len(value):,}" if isinstance(value, str) and len(value) > self.longest else shown(value)
        raise ValidationError(f"must be a string of 1 to {self.longest:,} printable characters, got {what}")


class Flag(fields.Field[bool]):
    """true or false."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> bool:
        if type(value) is bool:
            return value
        raise ValidationError(f"must be true or false, got {shown(value)}")


class Free(fields.Field[dict[str, Any]]):
    """An object with anything in it that JSON can say."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> dict[str, Any]:
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError, RecursionError):
                pass
            else:
                return value
        raise ValidationError(f"must be an object of plain JSON, got {shown(value)}")


class NodeId(fields.Field[str]):
    """A node's id."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> str:
        try:
            return check_node_id(value)
        except InvalidInput as error:
            raise ValidationError(str(error).partition(" ")[2]) from None  # the path names the field


class FilePath(Text):
    """A file of the checkpoint: relative, with forward slashes, below the repository's root."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> str:
        text = super()._deserialize(value, attr, data, **kwargs)
        if "\\" in text or any(part in {"", ".", ".."} for part in text.split("/")):
            raise ValidationError(f"must be a path below the repository's root, got {shown(text)}")
        return text


class ModelName(Text):
    """`owner/name`, or one name in metadata from elsewhere; never a path that leads anywhere."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> str:
        text = super()._deserialize(value, attr, data, **kwargs)
        if "\\" in text or text.count("/") > 1 or any(part in {"", ".", ".."} for part in text.split("/")):
            raise ValidationError(f"must be 'owner/name', got {shown(text)}")
        return text


class Lenient(Schema):
    """A schema that ignores fields it does not know: they come from newer versions and other programs."""

    class Meta(Schema.Meta):
        """marshmallow's options."""

        unknown = EXCLUDE

    #: What the fields make; None: they stay a mapping.
    value: ClassVar[type | None] = None

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> Any:
        """The value that the fields mean."""
        if self.value is None:
            return data
        return self.value(**{name: tuple(each) if isinstance(each, list) else each for name, each in data.items()})


class Many(fields.Field[list[Any]]):
    """A list of objects, each as a `Lenient` schema with one hook `make` has it.

    marshmallow's own `List(Nested(...))` visits every field that an object might have: 92,000 tensors with a few of
    a layer's 25 took 8 s. This visits those that are there.
    """

    def __init__(self, schema: type[Lenient], *, longest: int, shortest: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.schema, self.shortest, self.longest = schema(), shortest, longest
        named = self.schema.load_fields.items()
        self.by_key = {(field.data_key or name): (name, field) for name, field in named}
        self.must_have = [key for key, (_, field) in self.by_key.items() if field.required]
        self.defaults = [
            (name, field.load_default)
            for name, field in named
            if not field.required and field.load_default is not missing
        ]

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> list[Any]:
        if not isinstance(value, list):
            raise ValidationError(f"must be a list, got {shown(value)}")
        if not self.shortest <= len(value) <= self.longest:
            raise ValidationError(f"must have {self.shortest:,} to {self.longest:,} entries, got {len(value):,}")
        found: list[Any] = []
        errors: dict[int, Any] = {}
        for position, item in enumerate(value):
            try:
                found.append(self._one(item))
            except ValidationError as error:
                name = error.field_name
                errors[position] = error.messages if name == SCHEMA else {name: error.messages}
                if len(errors) >= 20:
                    break
        if errors:
            raise ValidationError(errors)
        return found

    def _one(self, item: Any) -> Any:
        if not isinstance(item, Mapping):
            raise ValidationError(f"must be an object, got {shown(item)}")
        values = {name: default() if callable(default) else default for name, default in self.defaults}
        errors: dict[str, Any] = {key: ["is required"] for key in self.must_have if key not in item}
        for key, value in item.items():
            if key in self.by_key:
                name, field = self.by_key[key]
                try:
                    values[name] = field.deserialize(value, key, item)
                except ValidationError as error:
                    errors[key] = error.messages
        if errors:
            raise ValidationError(errors)
        return self.schema.make(values)


def unknown_field(name: str, known: Iterable[str]) -> str:
    """What to say of a field that is not known: the nearest name that is, if there is one."""
    near = get_close_matches(name, list(known), n=1)
    return "is not a known field" + (f"; did you mean {near[0]!r}?" if near else "")


def missing_names() -> fields.List[str]:
    """A field of the tensors that a checkpoint lacks; null where that was not checked."""
    return fields.List(Text(), load_default=None, allow_none=True, validate=validate.Length(max=10**6))


def seconds(**kwargs: Any) -> Number:
    """A field of seconds."""
    return Number(high=MAX_SECONDS, **kwargs)


def _said(message: str) -> str:
    text = _WORDS.get(message, message)
    return f"{text[0].lower()}{text[1:-1]}" if text[:1].isupper() and text.endswith(".") else text


def explain(messages: Any, *, what: str) -> tuple[str, list[dict[str, str]]]:
    """Nested messages of marshmallow as one line and a list of {path, message}, `what` being the outermost thing."""
    found: list[dict[str, str]] = []

    def walk(at: Any, path: str) -> None:
        if len(found) >= 20:
            return
        if isinstance(at, dict):
            for key, inner in at.items():
                if isinstance(key, int):
                    walk(inner, f"{path}[{key}]")
                else:
                    walk(inner, path if key in {"_schema", "value"} else f"{path}.{key}" if path else str(key))
        else:
            all_of_it = at if isinstance(at, list) else [at]
            found.extend({"path": path[:200], "message": _said(str(message))} for message in all_of_it)

    walk(messages, "")
    line = "; ".join(f"{item['path']} {item['message']}".strip() for item in found[:3])
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return f"{what}: {line}{more}", found
