"""marshmallow fields that say what they expect and what they got, and errors with the path of the bad field."""
# ruff: noqa: ARG002  (the signature of `_deserialize` is marshmallow's)

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, fields

from planner.errors import InvalidInput
from planner.limits import MAX_BYTES, MAX_QUANTITY, MAX_SECONDS
from planner.names import check_node_id

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
            raise ValidationError(str(error)) from None


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


def seconds(**kwargs: Any) -> Number:
    """A field of seconds."""
    return Number(high=MAX_SECONDS, **kwargs)


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
            for message in at if isinstance(at, list) else [at]:
                text = {"Missing data for required field.": "is required"}.get(str(message), str(message))
                found.append(
                    {"path": path[:200], "message": text.replace("Field may not be null.", "must not be null")}
                )

    walk(messages, "")
    line = "; ".join(f"{item['path']} {item['message']}".strip() for item in found[:3])
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return f"{what}: {line}{more}", found
