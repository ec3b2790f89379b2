"""A profile's layers by the general rule: parameters, bytes and ties exact from the headers, costs from `rules`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from planner.dtypes import canonical
from planner.errors import InvalidCheckpoint
from planner.profile import Layer, Tensor, summed
from workers.checkpoint.config import ModelConfig
from workers.profiling import rules
from workers.profiling.cache_rule import LayerTensors, NotKnown, cache_terms
from workers.profiling.contents import NOTHING, Contents
from workers.profiling.layer_names import Group, Grouping, group_names

#: Architectures that end in a head over the vocabulary.
_WITH_HEAD = ("CausalLM", "LMHeadModel", "ConditionalGeneration", "MaskedLM", "PreTraining", "WithLMHead")
_HEADS = (".lm_head", ".embed_out", ".output", ".proj_out", ".head")
#: A head whose own tensors are only these is named for the tied matrix it applies.
_FINAL_NORMS = {"norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "final_logits_bias"}
_TOKEN_EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight", "embed_in.weight",
    "embeddings.weight", "embedding.weight", "tok_embeddings.weight",
)  # fmt: skip


def general_layers(
    contents: Contents, *, kv_dtype: str | None = None, known: Mapping[str, int] = NOTHING
) -> tuple[list[Layer], list[str]]:
    """Layers by the checkpoint's own names, their costs at batch 1 and one token by the general rule.

    Args:
        contents: The checkpoint's.
        kv_dtype: Dtype of the cached keys and values; default the model's.
        known: Tensor -> its parameters, where the model's code told.

    Returns:
        The layers, and the reasons why their FLOP and KV bytes are approximate.

    Raises:
        InvalidCheckpoint: If the config denies layers that the checkpoint has.
    """
    config = contents.config
    names = {tensor.name: tensor.size_bytes for tensor in contents.headers.tensors}
    extra = _extra_layers(names, config)
    grouping = group_names({name: size for name, size in names.items() if not name.startswith(extra)})
    check_depth(grouping, config)
    members: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in contents.headers.tensors:
        members[grouping.of.get(tensor.name, len(grouping.groups))].append(tensor)
    cache_dtype = canonical(kv_dtype) if kv_dtype else contents.float_dtype
    assert cache_dtype is not None
    unknown: list[str] = []
    layers = []
    for index, group in enumerate(grouping.groups):
        layer, why = _general_layer(
            group, tuple(members[index]), contents, index=index, kv_dtype=cache_dtype, known=known
        )
        layers.append(layer)
        unknown += [why] if why else []
    layers = _with_tied_head(layers, contents, known)
    reasons = [_what_was_done(contents.headers.tensors, config), *_unknown_caches(unknown)]
    if members.get(len(grouping.groups)):
        layers.append(contents.unused_layer(members[len(grouping.groups)], len(layers)))
    unsure = [tensor for layer in layers for tensor in layer.tensors if contents.parameters(tensor, known) is None]
    if unsure:
        reasons.append(
            f"parameters not known: only the model's class tells how {len(unsure)} tensors are packed "
            f"({unsure[0].name}, ...); FLOP as if a packed value took the bits that config.json states, or 4"
        )
    return layers, reasons


def _what_was_done(tensors: Sequence[Tensor], config: ModelConfig) -> str:
    """The note on what the general rule counted."""
    text = "FLOP and activations by the general rule: 2 × active parameters × tokens + attention scores"
    if not any(rules.is_expert(tensor.name) for tensor in tensors):
        return text
    counts = rules.expert_counts(config)
    if counts is None:
        return f"{text}, all routed experts counted as active: the config does not say how many a token takes"
    return f"{text}, {counts[0]} of {counts[1]} routed experts for each token"


def _unknown_caches(unknown: Sequence[str]) -> list[str]:
    """The note on layers whose cache is not known, if there are any."""
    if not unknown:
        return []
    return [f"KV cache not known in {len(unknown)} layers: {unknown[0]}"]


def check_depth(grouping: Grouping, config: ModelConfig) -> None:
    """Check that the main stack has as many layers as the config says.

    Raises:
        InvalidCheckpoint: If it has more or fewer.
    """
    # Layers that share their weights are stored once.
    wanted = config.number("num_hidden_groups", "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    stacks = grouping.stacks
    if wanted is None or len(stacks) != 1 or config.text is not config.values:
        return
    stack, _ = next(iter(stacks.items()))
    numbers = {group.number for group in grouping.groups if group.number is not None}
    if numbers != set(range(wanted)):
        denied, missing = sorted(numbers - set(range(wanted))), sorted(set(range(wanted)) - numbers)
        what = f"has {stack}.{denied[0]}" if denied else f"has no {stack}.{missing[0]}"
        raise InvalidCheckpoint(
            f"config.json says {wanted} layers, but the checkpoint {what} ({len(numbers)} layers in all)",
            details={"config_layers": wanted, "checkpoint_layers": len(numbers), "stack": stack},
        )


def _extra_layers(names: Mapping[str, int], config: ModelConfig) -> tuple[str, ...]:
    """Prefixes of the speculative layers that a config counts beside its own (multi-token prediction)."""
    depth, extra = config.number("num_hidden_layers"), config.number("num_nextn_predict_layers")
    if not depth or not extra or extra > 64:
        return ()
    stacks = {name[: name.index(f".{depth}.")] for name in names if f".layers.{depth}." in name}
    return tuple(f"{stack}.{number}." for stack in sorted(stacks) for number in range(depth, depth + extra))


def _general_layer(
    group: Group,
    tensors: tuple[Tensor, ...],
    contents: Contents,
    *,
    index: int,
    kv_dtype: str,
    known: Mapping[str, int],
) -> tuple[Layer, str]:
    """The layer, and why its cache is not known, if it is not."""
    config, dtype = contents.config, contents.float_dtype
    num_params = summed(contents.parameters(tensor, known) for tensor in tensors)
    values = [contents.about(tensor, known) for tensor in tensors]
    share = rules.expert_share(config)
    beside = [tensor.size_bytes for tensor in tensors if contents.counts[tensor.name] == 0]
    shares = [share if rules.is_expert(tensor.name) else 1.0 for tensor in tensors]
    active = sum(count * each for count, each in zip(values, shares, strict=True))
    kv, why, attentions = None, "", 1
    if group.number is not None and rules.keeps_cache(group.layer_type, config):
        # Experts keep nothing, and are nearly all of 100,000 tensors.
        kept = (tensor for tensor in tensors if not rules.is_expert(tensor.name))
        inner = {tensor.name.removeprefix(f"{group.name}."): tensor for tensor in kept}
        layer = LayerTensors(number=group.number, tensors=inner)
        attentions = max(1, layer.attentions())
        try:
            kv = cache_terms(layer, config, dtype=dtype, kv_dtype=kv_dtype)
        except NotKnown as error:
            why = str(error)
    terms = rules.layer_terms(group.layer_type, tensors, values, config, attentions=attentions)
    return Layer(
        name=group.name,
        index=index,
        layer_type=group.layer_type,
        num_params=num_params,
        active_params=None if num_params is None else round(active),
        weight_bytes=sum(tensor.end - tensor.begin for tensor in tensors),
        overhead_bytes=0 if num_params is None else sum(beside),
        kv_cache_bytes=kv.bytes_at(1, 1) if kv else 0,
        kv_known=not why,
        activation_bytes=rules.hidden_bytes(config, dtype),
        compute_required=sum(terms),
        compute_terms=terms,
        kv_terms=kv,
        tensors=tensors,
    ), why


def _with_tied_head(layers: Sequence[Layer], contents: Contents, known: Mapping[str, int]) -> list[Layer]:
    """Give a head that has no weights of its own those of the embedding, where the architecture has a head."""
    config = contents.config
    stored = {name: layer for layer in layers for name in (t.name for t in layer.tensors)}
    flagged = config.flag("tie_word_embeddings")
    has_head = (config.architecture or "").endswith(_WITH_HEAD)
    candidates = [
        tensor
        for layer in layers
        for tensor in layer.tensors
        if layer.layer_type == "embedding" and tensor.name.endswith(_TOKEN_EMBEDDINGS) and len(tensor.shape) == 2
    ]
    # The table of tokens is larger than those of positions and types.
    embedding = max(candidates, key=lambda tensor: tensor.end - tensor.begin, default=None)
    own_head = any(_parts(name)[0].endswith(_HEADS) and _parts(name)[1] != "bias" for name in stored)
    if embedding is None or not has_head or flagged is False or own_head:
        return list(layers)
    count = contents.about(embedding, known)
    module = embedding.name.removesuffix("weight")
    tied = [tensor for tensor in stored[embedding.name].tensors if tensor.name.startswith(module)]
    found = [layer for layer in layers if layer.layer_type == "head"]
    if found:
        old = found[-1]
    else:
        old = Layer(name="lm_head", index=len(layers), layer_type="head")
        layers = [*layers, old]
    terms = (0.0, (old.compute_terms or (0.0, 0.0, 0.0))[1] + 2.0 * count, 0.0)
    head = replace(
        old,
        name="lm_head" if old.name.rpartition(".")[2] in _FINAL_NORMS else old.name,
        tied_to=stored[embedding.name].name,
        tied_bytes=sum(tensor.size_bytes for tensor in tied),
        tied_tensors=tuple(tensor.name for tensor in tied),
        active_params=summed((old.active_params, contents.parameters(embedding, known))),
        compute_terms=terms,
        compute_required=sum(terms),
    )
    return [head if layer is old else layer for layer in layers]


def _parts(name: str) -> tuple[str, str]:
    """The module that a tensor lies in, with a dot before it, and the tensor's own name."""
    path, _, last = name.rpartition(".")
    return f".{path}", last
