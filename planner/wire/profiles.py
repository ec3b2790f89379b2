"""marshmallow schemas of what comes from elsewhere: metadata and plans. Loaded only when something is read."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from marshmallow import Schema, ValidationError, fields, post_load, validate

from planner import dtypes
from planner.errors import InvalidInput, InvalidMetadata
from planner.limits import MAX_BATCH_SIZE, MAX_LAYERS, MAX_SEQUENCE_LENGTH
from planner.names import MOST_REVISION
from planner.profile import KvTerms, Layer, MaskTerms, ModelProfile, Tensor
from planner.wire.fields import (
    FilePath,
    Integer,
    Lenient,
    Many,
    ModelName,
    Number,
    Text,
    explain,
    missing_names,
    shown,
)
from planner.wire.write import SCHEMA_VERSION


class TensorSchema(Lenient):
    """A tensor as a checkpoint file stores it."""

    name = Text(required=True)
    file = FilePath(required=True)
    dtype = Text(longest=64, required=True)
    shape = fields.List(Integer(), required=True, validate=validate.Length(max=32))
    begin = Integer(required=True)
    end = Integer(required=True)

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> Tensor:
        """The value."""
        if data["end"] < data["begin"]:
            raise ValidationError(f"must not be before begin ({data['begin']:,}), got {data['end']:,}", "end")
        return Tensor(**{**data, "shape": tuple(data["shape"])})


class KvTermsSchema(Lenient):
    """KV cache of one layer by sequence length."""

    value = KvTerms
    fixed_bytes = Integer(load_default=0)
    bytes_per_token = Integer(load_default=0)
    window_tokens = Integer(low=1, load_default=None, allow_none=True)
    bytes_per_later_token = Integer(load_default=0)


class MaskTermsSchema(Lenient):
    """What an attention mask hides."""

    value = MaskTerms
    flop_per_pair = Number(required=True)
    behind_tokens = Integer(load_default=None, allow_none=True)
    ahead_tokens = Integer(load_default=None, allow_none=True)
    chunk_tokens = Integer(low=1, load_default=None, allow_none=True)


def _terms(**options: Any) -> fields.List[float]:
    """Three coefficients. A negative one is possible: work inside a window grows slower than its start suggests."""
    return fields.List(Number(low=-1e30), validate=validate.Length(equal=3), **options)


class LayerSchema(Lenient):
    """A layer, or a single tensor of williw metadata."""

    name = Text(required=True)
    compute_required = Number(required=True)
    index = Integer(load_default=None, allow_none=True)
    layer_type = Text(longest=128, load_default="unknown", allow_none=True)
    num_params = Integer(load_default=None, allow_none=True)
    active_params = Integer(load_default=None, allow_none=True)
    weight_bytes = Integer(load_default=None, allow_none=True)
    overhead_bytes = Integer(load_default=0)
    # null: not known.
    kv_cache_bytes = Integer(load_default=0, allow_none=True)
    activation_bytes = Integer(load_default=0)
    peak_bytes = Integer(load_default=0)
    compute_min = Number(load_default=None, allow_none=True)
    compute_terms = _terms(load_default=None, allow_none=True)
    once_terms = _terms(load_default=None, allow_none=True)
    terms_range = fields.List(
        Integer(allow_none=True), validate=validate.Length(equal=2), load_default=None, allow_none=True
    )
    kv_terms = fields.Nested(KvTermsSchema, load_default=None, allow_none=True)
    parts = fields.Dict(keys=Text(longest=64), values=Number(), load_default=dict)
    part_terms = fields.Dict(keys=Text(longest=64), values=_terms(), load_default=dict)
    once_part_terms = fields.Dict(keys=Text(longest=64), values=_terms(), load_default=dict)
    mask_terms = fields.Nested(MaskTermsSchema, load_default=None, allow_none=True)
    activation_terms = _terms(load_default=None, allow_none=True)
    peak_terms = _terms(load_default=None, allow_none=True)
    tied_to = Text(load_default=None, allow_none=True)
    tied_bytes = Integer(load_default=0)
    tied_tensors = fields.List(Text(), load_default=list)
    idle_in = Text(choices=("text", "profile"), load_default="")
    shared_kv_bytes_per_token = Integer(load_default=0)
    modules = fields.List(fields.String(validate=validate.Length(max=512)), load_default=list)
    tensors = Many(TensorSchema, longest=10**6, load_default=list)
    # The williw form's: one tensor's.
    shape = fields.List(Integer(), validate=validate.Length(max=32), load_default=None, allow_none=True)
    dtype = Text(longest=64, load_default=None, allow_none=True)

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Counts that are not given follow from the tensors, or from shape and dtype; else bytes are 0."""
        shape, dtype = data.pop("shape"), data.pop("dtype")
        if data["num_params"] is None:
            data["num_params"] = prod(shape) if shape is not None else None
        if data["active_params"] is None:
            data["active_params"] = data["num_params"]
        if data["weight_bytes"] is None:
            stored = sum(tensor.size_bytes for tensor in data["tensors"])
            data["weight_bytes"] = stored or (dtypes.size_bytes(shape, dtype) or 0 if shape and dtype else 0)
        first, last = data["terms_range"] or (0, None)
        if data["terms_range"] is not None:
            if first is None or (last is not None and last < first):
                raise ValidationError(f"must be [first, last or null], got {data['terms_range']}", "terms_range")
            data["terms_range"] = (first, last)
        for terms in ("compute_terms", "once_terms", "activation_terms", "peak_terms"):
            if data[terms] is not None:
                data[terms] = tuple(data[terms])
        for terms in ("part_terms", "once_part_terms"):
            data[terms] = {part: tuple(each) for part, each in data[terms].items()}
        data["kv_known"] = data["kv_cache_bytes"] is not None
        data["kv_cache_bytes"] = data["kv_cache_bytes"] or 0
        for names in ("tied_tensors", "modules"):
            data[names] = tuple(data[names])
        data["layer_type"] = data["layer_type"] or "unknown"
        data["tensors"] = tuple(data["tensors"])
        return data


class ProfileSchema(Lenient):
    """The published metadata of one model revision."""

    schema_version = Integer(low=1, high=10**6, load_default=None, allow_none=True)
    model_name = ModelName(required=True)
    revision = Text(longest=MOST_REVISION, load_default=None, allow_none=True)
    model_type = Text(longest=128, load_default=None, allow_none=True)
    architecture = Text(longest=256, load_default=None, allow_none=True)
    dtype = Text(longest=64, load_default=None, allow_none=True)
    batch_size = Integer(low=1, high=MAX_BATCH_SIZE, load_default=1)
    sequence_length = Integer(low=1, high=MAX_SEQUENCE_LENGTH, load_default=512)
    unit = Text(choices=("layer", "tensor"), load_default=None, allow_none=True)
    approximate = fields.List(Text(longest=4096), load_default=list)
    missing_tensors = missing_names()
    longest_sequence = Integer(low=1, load_default=None, allow_none=True)
    generated_at = fields.Raw(load_default=None, allow_none=True)
    node_id = Text(longest=256, load_default=None, allow_none=True)
    layers = Many(LayerSchema, shortest=1, longest=MAX_LAYERS, required=True)

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> ModelProfile:
        """The value, once its layers agree with each other."""
        version = data.pop("schema_version")
        if version is not None and version > SCHEMA_VERSION:
            raise ValidationError(f"is {version}; this release reads up to {SCHEMA_VERSION}", "schema_version")
        seen: dict[str, int] = {}
        layers: list[Layer] = []
        for position, item in enumerate(data["layers"]):
            first = seen.setdefault(item["name"], position)
            if first != position:
                raise ValidationError(_at(position, "name", f"{shown(item['name'])} is layers[{first}]'s name too"))
            if item["index"] not in {None, position}:
                raise ValidationError(
                    _at(position, "index", f"must be {position}, its position, got {item['index']}")
                )
            layers.append(Layer(**{**item, "index": position}))
        for layer in layers:
            if layer.tied_to is not None and (layer.tied_to not in seen or layer.tied_to == layer.name):
                raise ValidationError(_at(layer.index, "tied_to", f"{shown(layer.tied_to)} is no other layer's name"))
        unit = data.pop("unit") or ("tensor" if version is None else "layer")
        when = data.pop("generated_at")
        missing = data["missing_tensors"]
        data.update(layers=tuple(layers), approximate=tuple(data["approximate"]), unit=unit)
        data.update(missing_tensors=None if missing is None else tuple(missing))
        return ModelProfile(**data, generated_at=None if when is None else str(when)[:64])


def _at(position: int, field: str, message: str) -> dict[str, Any]:
    return {"layers": {position: {field: [message]}}}


def load(schema: Schema, obj: object, *, what: str, error: type[InvalidInput] = InvalidMetadata) -> Any:
    """The value that `obj` means by `schema`.

    Raises:
        InvalidInput: `error`, with the path of each bad field, what it must be and what it is.
    """
    if not isinstance(obj, Mapping):
        raise error(f"{what}: must be an object, got {shown(obj)}")
    try:
        return schema.load(obj)
    except ValidationError as problem:
        line, found = explain(problem.messages, what=what)
        raise error(line, details={"errors": found}) from None
    except RecursionError:
        raise error(f"{what}: nests too deeply") from None
