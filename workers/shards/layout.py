"""Decides which tensors a node's shard holds and where each byte of them goes. Writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from planner.errors import Conflict, InvalidMetadata, NotFound
from planner.plan import Plan
from planner.profile import Layer, ModelProfile, Tensor
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.choice.modules import later_modules, model_folder
from workers.checkpoint.headers import read_headers, read_sources
from workers.checkpoint.shared_storage import distinct, place
from workers.checkpoint.source import Source
from workers.transfer.outputs import Output, pack

#: Every node needs these, whatever it holds.
_CONFIGS = (
    "config.json", "generation_config.json", "quantization_config.json", "quantize_config.json", "modules.json",
)  # fmt: skip
#: The first node takes the rest of these: tokenizer, processor, chat template.
_EXTRA_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken"})
_LARGEST_EXTRA_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All that a node's shard will hold."""

    outputs: tuple[Output, ...]
    #: Small files taken as they are, with their sizes in bytes.
    extras: Mapping[str, int]
    sources: Mapping[str, Source]
    layers: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    #: Aliases that the checkpoint has as names of tensors.
    twins: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    duplicated: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(output.size_bytes for output in self.outputs)


def lay_out(
    checkpoint: Checkpoint,
    profile: ModelProfile,
    plan: Plan,
    *,
    node_id: str,
    max_shard_bytes: int,
    file_per_run: bool = False,
) -> Layout:
    """Decide what `node_id`'s shard holds.

    The headers of the checkpoint files concerned are read again and must agree with the profile, so that wrong
    metadata never becomes a wrong shard.

    Args:
        checkpoint: Where the bytes will come from.
        profile: Its layers with their tensors; layers without any (metadata of other makers) are looked up by name.
        plan: Whose layers go where.
        node_id: The node whose shard it is.
        max_shard_bytes: A weight file is closed before it would grow beyond this; a larger tensor has its own.
        file_per_run: Give each contiguous run a file of its own, so that all of it can be reflinked.

    Raises:
        NotFound: If the plan gives `node_id` nothing.
        Conflict: If plan, profile and checkpoint are not of one revision.
        InvalidMetadata: If the profile does not describe the checkpoint.
        InvalidCheckpoint: If a header is malformed.
    """
    _check_revisions(checkpoint, profile, plan)
    if node_id not in plan.allocation:
        raise NotFound(
            f"plan {plan.plan_id} gives node {node_id!r} nothing; its nodes are {', '.join(sorted(plan.allocation))}",
            details={"node_id": node_id, "nodes": sorted(plan.allocation)},
        )
    profile = _with_tensors(profile, checkpoint)
    layers = {layer.name: layer for layer in profile.layers}
    unknown = [name for names in plan.allocation.values() for name in names if name not in layers]
    if unknown:
        raise InvalidMetadata(
            f"the plan's layer {unknown[0]!r} is not in the profile ({len(unknown)} of them are not)",
            details={"layers": unknown[:20]},
        )
    first = _first_node(profile, plan)
    held = [layers[name] for name in plan.allocation[node_id]]
    if node_id == first:
        planned = {name for names in plan.allocation.values() for name in names}
        held += [layer for layer in profile.layers if layer.name not in planned]
    wanted, duplicated, tied = _wanted(held, layers)
    begins: dict[str, int] = {}
    for tensor in (tensor for layer in profile.layers for tensor in layer.tensors):
        begins[tensor.file] = min(begins.get(tensor.file, tensor.begin), tensor.begin)
    files = sorted({tensor.file for tensor, _ in wanted})
    absent = [name for name in files if name not in checkpoint.files]
    if absent:
        raise InvalidMetadata(
            f"the profile places tensors in {absent[0]!r}, which {checkpoint.model_name} does not have"
        )
    # The first tensor begins where the header ends.
    sources = {each.name: each for each in read_sources(checkpoint, {name: begins[name] for name in files})}
    _check_headers(wanted, sources)
    wanted, aliases = _without_twins([*wanted, *_unnamed(wanted, profile, sources)])
    outputs = pack(wanted, sources, max_shard_bytes=max_shard_bytes, file_per_run=file_per_run)
    return Layout(
        outputs=outputs,
        extras=_extras(checkpoint, first=node_id == first, last=node_id == _last_node(profile, plan)),
        sources=sources,
        layers=tuple(layer.name for layer in held),
        aliases=aliases | {name: aliases.get(other, other) for name, other in tied.items()},
        twins=tuple(aliases),
        unused=tuple(t.name for layer in held if layer.layer_type == "unused" for t in layer.tensors),
        duplicated=duplicated,
    )


def _check_revisions(checkpoint: Checkpoint, profile: ModelProfile, plan: Plan) -> None:
    for what, revision in (("plan", plan.revision), ("profile", profile.revision)):
        if revision not in {None, checkpoint.revision}:
            raise Conflict(
                f"the {what} is for revision {revision} of {plan.model_name}, the files are {checkpoint.revision}",
                details={"wanted": revision, "found": checkpoint.revision},
            )


def _first_node(profile: ModelProfile, plan: Plan) -> str:
    """The node that holds the first layer: inputs enter there, so the tokenizer does too."""
    holders = {name: node for node, names in plan.allocation.items() for name in names}
    return next((holders[layer.name] for layer in profile.layers if layer.name in holders), min(plan.allocation))


def _last_node(profile: ModelProfile, plan: Plan) -> str:
    """The node that holds the last layer: what pools its output, and modules without weights, are there."""
    holders = {name: node for node, names in plan.allocation.items() for name in names}
    used = [layer.name for layer in reversed(profile.layers) if layer.layer_type != "unused"]
    return next((holders[name] for name in used if name in holders), max(plan.allocation))


def _with_tensors(profile: ModelProfile, checkpoint: Checkpoint) -> ModelProfile:
    """The profile with the tensors of layers that name none looked up in the checkpoint's headers."""
    if any(layer.tensors for layer in profile.layers):
        return profile
    headers = read_headers(checkpoint)
    later = [tensor for _, tensors in headers.modules for tensor in tensors]
    by_name = {tensor.name: tensor for tensor in (*headers.tensors, *headers.twins, *later)}
    layers = []
    for layer in profile.layers:
        names = _names_of(layer.name, by_name)
        layers.append(replace(layer, tensors=tuple(by_name.pop(name) for name in names)))
    for twin in headers.twins:
        by_name.pop(twin.name, None)
    if by_name:
        rest = Layer(name="unused", index=len(layers), layer_type="unused", tensors=tuple(by_name.values()))
        layers.append(rest)
    return replace(profile, layers=tuple(layers))


def _names_of(layer: str, tensors: Iterable[str]) -> list[str]:
    """The tensors that a layer named by a tensor or a module path means, whatever prefix the checkpoint has."""
    names = list(tensors)
    for rule in (
        [name for name in names if name == layer],
        [name for name in names if name.startswith(f"{layer}.")],
        [name for name in names if name.endswith(f".{layer}")],
        [name for name in names if layer.endswith(f".{name}")],
    ):
        if rule:
            return rule
    return []  # a tied head is named by models, and stored by no file


def _wanted(
    held: Sequence[Layer], layers: Mapping[str, Layer]
) -> tuple[list[tuple[Tensor, str]], tuple[str, ...], dict[str, str]]:
    """Tensors with their layer; the names that are held although another layer stores them; their aliases."""
    wanted = {tensor.name: (tensor, layer.name) for layer in held for tensor in layer.tensors}
    duplicated: list[str] = []
    aliases: dict[str, str] = {}
    for layer in held:
        if layer.tied_to is None:
            continue
        if layer.tied_to not in layers:
            raise InvalidMetadata(f"layer {layer.name!r} is tied to {layer.tied_to!r}, which the profile lacks")
        shared = layers[layer.tied_to].tensors
        named = [tensor for tensor in shared if tensor.name in layer.tied_tensors]
        exact = [tensor for tensor in shared if tensor.size_bytes == layer.tied_bytes]
        for tensor in named or exact[:1] or shared:
            if tensor.name not in wanted:
                wanted[tensor.name] = (tensor, layer.tied_to)
                duplicated.append(tensor.name)
            aliases.setdefault(f"{layer.name}.{tensor.name.rpartition('.')[2]}", tensor.name)
    return list(wanted.values()), tuple(duplicated), {a: b for a, b in aliases.items() if a not in wanted}


def _check_headers(wanted: Sequence[tuple[Tensor, str]], sources: Mapping[str, Source]) -> None:
    for tensor, _ in wanted:
        source = sources[tensor.file]
        if source.tensors.get(tensor.name) != tensor:
            raise InvalidMetadata(
                f"the profile and {tensor.file} disagree on {tensor.name!r}: {tensor} and "
                f"{source.tensors.get(tensor.name)}; profile the model again",
                details={"tensor": tensor.name, "file": tensor.file},
            )


def _unnamed(
    wanted: Sequence[tuple[Tensor, str]], profile: ModelProfile, sources: Mapping[str, Source]
) -> list[tuple[Tensor, str]]:
    """Further names of wanted bytes that no layer of the profile has: they travel with the first name."""
    found = []
    for source in sources.values():
        first, twins = distinct(() if source.header else source.tensors.values())
        if twins:
            names = {place(tensor): tensor.name for tensor in first}
            layer_of = {tensor.name: layer for tensor, layer in wanted}
            named = {tensor.name for layer in profile.layers for tensor in layer.tensors}
            found += [
                (twin, layer_of[names[place(twin)]])
                for twin in twins
                if twin.name not in named and names[place(twin)] in layer_of
            ]
    return found


def _without_twins(wanted: Sequence[tuple[Tensor, str]]) -> tuple[list[tuple[Tensor, str]], dict[str, str]]:
    """One name for each range of bytes (safetensors refuses two), and the others of its kind as its aliases."""
    kept: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for tensor, _ in wanted:
        kind = (*place(tensor), tensor.dtype, tensor.shape)
        if tensor.size_bytes and kept.setdefault(kind, tensor.name) != tensor.name:
            aliases[tensor.name] = kept[kind]
    rest = [item for item in wanted if item[0].name not in aliases]
    return sorted(rest, key=lambda item: (*place(item[0]), item[0].name)), aliases


def _extras(checkpoint: Checkpoint, *, first: bool, last: bool) -> dict[str, int]:
    """Config files, for the first node tokenizer and the like, for the last its modules'; no weights or code."""
    sizes = {}
    # Where the model lies in a folder, the root's small files come along as well.
    own, later = ("", model_folder(checkpoint)), tuple(module.folder for module in later_modules(checkpoint))
    for name, file in sorted(checkpoint.files.items()):
        folder, _, base = name.rpartition("/")
        folder = folder and f"{folder}/"
        if name.endswith(".index.json") or name == "manifest.json":
            continue
        small = PurePosixPath(name).suffix in _EXTRA_SUFFIXES and file.size_bytes <= _LARGEST_EXTRA_BYTES
        if (folder in own and (base in _CONFIGS or (first and small))) or (folder in later and last and small):
            sizes[name] = file.size_bytes
    return sizes
