"""Runs the layers of one shard: `load_stage(path)` makes a torch module of them.

    stage = load_stage("shards/<plan>/<node>")
    step = stage(Handoff(inputs={"input_ids": ids}))        # on the first node of the chain
    step = stage(Handoff.from_bytes(received))              # on the others
    # a Handoff for the next node (step.to_bytes()), or, from the last one, the model's own output

Every stage has the whole model's code and only its own weights. It runs the model's forward from the start; calls of
layers that it does not hold return their results if these were handed on, else tensors of the right shape without
memory, which no result that counts depends on (`workers.runtime.dataflow`). So masks, positions, residual streams and
whatever an architecture does between its layers need no code here, and the results are those of the whole model,
bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from planner.errors import Conflict, InvalidInput, NotFound
from workers.checkpoint.choice.modules import model_folder
from workers.checkpoint.config import read_config
from workers.checkpoint.folder import open_folder
from workers.profiling.tracing.module_tree import find_units
from workers.profiling.tracing.skeleton import NotTraceable, build, first_line, quiet
from workers.runtime.caches import RealCache, check_generates
from workers.runtime.dataflow import trace
from workers.runtime.payload import Handoff, whole_arguments
from workers.runtime.visits import Flow, Runner, Stop, Units
from workers.runtime.weights import load_weights, silent_bars, skeleton, switch_caches_off
from workers.shards.manifest import Manifest, read_manifest

_TRACES = 64


class Stage(nn.Module):
    """The layers of one shard; made by `load_stage`."""

    def __init__(
        self, manifest: Manifest, model: PreTrainedModel, whole: PreTrainedModel, there: frozenset[str]
    ) -> None:
        super().__init__()
        self.manifest = manifest
        self.model = model
        #: The same model on the meta device; not a submodule, so that `parameters()` are this stage's.
        self._whole = (whole,)
        layers = {name for names in manifest.nodes.values() for name in names}
        self._units = find_units(whole, layers)
        #: Unit -> the plan's layer that it is (part of); a final norm beside a head is of none by its name.
        self._layer_of = {unit: _within(unit, layers) for unit in self._units}
        #: Names of the weights and buffers that this shard brought.
        self._there = there
        missing = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in there]
        #: Paths of the units whose weights are all here, those aside that are another node's layers (tied weights).
        self.held = frozenset(
            unit
            for unit, layer in self._layer_of.items()
            if (layer is None or layer in manifest.layers) and not any(n.startswith(f"{unit}.") for n in missing)
        )
        self._wrapped = Units(model, self._units)
        self._flows: dict[Any, Flow] = {}
        #: First passes of sessions as they were traced; the last one for each number of sequences. For `Session`.
        self.firsts: dict[Any, Any] = {}
        self.bases: dict[Any, Any] = {}
        #: Held by the one pass that runs or is traced.
        self.lock = threading.RLock()

    def can(self, key: str) -> bool:
        """Whether this stage holds a unit's weights (by module path), or a single one (by `=` or `~` and name)."""
        return key[1:] in self._there if key[0] in "=~" else key in self.held

    def has(self, path: str) -> bool:
        """Whether the module of this path belongs to a unit that this stage holds."""
        return any(path == unit or path.startswith(f"{unit}.") for unit in self.held)

    @torch.no_grad()
    def forward(self, step: Handoff) -> Any:
        """Run what this stage holds and can run now.

        Returns:
            A `Handoff` for the node that holds what is to run next, or the model's output after the last layer.

        Raises:
            Conflict: If the handoff is of another plan or revision, or there is nothing for this stage to do yet.
            InvalidInput: If the model cannot be divided for such inputs.
        """
        with self.lock:
            return self.visit(self.arrive(step), step, whole_arguments(step.inputs, step.settings))

    def arrive(self, step: Handoff) -> Flow:
        """The data flow of a pass without a session; runs nothing.

        Raises:
            InvalidInput: If the model cannot be divided for such inputs.
        """
        with self.lock:
            key = (_shapes(step.inputs), repr(sorted(step.settings.items())))
            return self.flow(key, whole_arguments(step.inputs, step.settings))

    def visit(
        self, flow: Flow, step: Handoff, arguments: Mapping[str, Any], caches: tuple[RealCache, Any] | None = None
    ) -> Any:
        """Run what is held and can run now of a pass; for `forward` and sessions.

        Args:
            flow: The trace for such a pass.
            step: What was handed to this stage.
            arguments: The model's.
            caches: The real cache, and the clock's among the arguments.

        Raises:
            Conflict: If the handoff is of another plan or revision, or there is nothing for this stage to do yet.
            InvalidInput: If the model cannot be divided for such inputs, or what was handed on is not a number.
        """
        self._check(step)
        for key, value in step.values.items():
            if value.is_floating_point() and bool(value.isnan().any()):
                raise InvalidInput(f"{key}, which was handed on, has values that are no numbers (NaN)")
        todo = flow.visit(step.values)
        visit = todo.visit
        if visit.next_module is not None and not visit.compute:
            raise Conflict(
                f"node {self.manifest.node_id} holds nothing that can run now: {visit.next_module} is next, on "
                f"another node",
                details={"next_module": visit.next_module, "held": sorted(self.held)},
            )
        run = Runner(flow, todo, step.values, self.model.device, caches)
        with self._lent(step.values), self._wrapped.running(run):
            try:
                output = self.model(**arguments)
            except Stop:
                output = None
            except RuntimeError as error:
                if "single memory location" not in str(error):
                    raise
                raise InvalidInput(
                    f"{self.manifest.model_name} cannot be run in stages: its code writes into weights that "
                    f"other nodes hold (as RWKV does to rescale its layers)"
                ) from error
        if visit.next_module is None:
            return output
        own = {k: self.model.get_parameter_or_buffer(k[1:]) for k in visit.hand_on if k[0] in "=~" and self.can(k)}
        values = {key: run.made[key] if key in run.made else step.values[key] for key in visit.hand_on - own.keys()}
        return replace(
            step,
            values=values | own,
            plan_id=self.manifest.plan_id,
            revision=self.manifest.revision,
            next_module=visit.next_module,
        )

    def _check(self, step: Handoff) -> None:
        mine = (self.manifest.plan_id, self.manifest.revision)
        if step.plan_id is not None and (step.plan_id, step.revision) != mine:
            raise Conflict(
                f"the handoff is of plan {step.plan_id} at {step.revision}, this shard of {mine[0]} at {mine[1]}",
                details={"wanted": list(mine), "found": [step.plan_id, step.revision]},
            )

    def flow(self, key: Any, arguments: Mapping[str, Any], *, cache: Any = None, states: Any = ()) -> Flow:
        """The data flow for such arguments; remembered under `key`.

        Args:
            key: What tells it from others.
            arguments: The forward's; tensors count for their shapes.
            cache: The cache among them, on the meta device.
            states: What modules keep as of then, as ((module path, attribute), value).

        Raises:
            InvalidInput: If the model cannot be divided for such arguments.
        """
        if key in self._flows:
            return self._flows[key]
        whole = self._whole[0]
        places = [(whole.get_submodule(path).__dict__, name, value) for (path, name), value in states]
        kept = [attributes.get(name) for attributes, name, _ in places]
        with quiet():
            try:
                for attributes, name, value in places:
                    attributes[name] = value
                found = trace(whole, self._units, arguments, cache=cache)
            except Exception as error:
                raise InvalidInput(
                    f"{self.manifest.model_name} cannot be run in stages on these inputs: {_reason(error)}"
                ) from error
            finally:
                for (attributes, name, _), value in zip(places, kept, strict=True):
                    attributes[name] = value
        if len(self._flows) >= _TRACES:
            for remembered in (self._flows, self.firsts, self.bases):
                remembered.clear()
        self._flows[key] = Flow(found, self.can, self._layer_of.get)
        return self._flows[key]

    def known(self, key: Any) -> Flow | None:
        """What `flow` remembers under `key`."""
        return self._flows.get(key)

    @property
    def whole(self) -> PreTrainedModel:
        """The whole model, on the meta device."""
        return self._whole[0]

    @contextmanager
    def _lent(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, weights that were handed on are in their places."""
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            for key, value in values.items():
                if key[0] in "=~" and not self.can(key):
                    place = self.model.get_parameter_or_buffer(key[1:])
                    kept.append((place, place.data))
                    place.data = value
            yield
        finally:
            for place, data in kept:
                place.data = data


def _shapes(inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(inputs.items()))


def _within(path: str, layers: Collection[str]) -> str | None:
    """The layer that the module at `path` is or is in, the nearest first; None: it is in none."""
    while path and path not in layers:
        path = path.rpartition(".")[0]
    return path or None


def _reason(error: Exception) -> str:
    """Why a model could not be traced, in a line."""
    if isinstance(error, NotImplementedError) and "data-independent" in str(error):
        return "the shapes within it depend on values, as those of Switch Transformers' experts do"
    if "on meta tensors" in str(error):
        return "its code looks at tensors' values, as LLaVA's does at those of images"
    if "expected device" in str(error):
        return "its code makes tensors on the CPU wherever the others are, as XLNet's does"
    return first_line(error)


def load_stage(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    generates: bool = False,
) -> Stage:
    """The layers of the shard in `path`, ready to run; memory is that of their weights.

    Args:
        path: A finished shard, as `workers.splitter.split` writes it.
        device: Where the weights go.
        attn_implementation: As in `from_pretrained`; default that of transformers.
        generates: Refuse a model that cannot generate text in stages, before its weights are loaded.

    Raises:
        NotFound: If there is no finished shard.
        IntegrityError: If its manifest cannot be read.
        InvalidInput: If transformers has no code of its own for the model, or it is quantised.
        InvalidCheckpoint: If the weights do not fit the model.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    files = open_folder(folder, model_name=manifest.model_name, revision=manifest.revision)
    if f"{model_folder(files)}config.json" not in files.files:
        raise NotFound(f"{folder} has no config.json, so it cannot be run")
    config = read_config(files)
    if config.quantization:
        raise InvalidInput(f"{manifest.model_name} is quantised; stages of such models cannot be run yet")
    # transformers writes infinities as {"__float__": "Infinity"}, and its from_dict does not take them so.
    values = transformers.PretrainedConfig._decode_special_floats(dict(config.values))  # noqa: SLF001
    config = replace(config, values=values)
    try:
        whole = build(config)
    except NotTraceable as error:
        raise InvalidInput(f"{manifest.model_name} cannot be run in stages: {error}") from error
    if generates:
        check_generates(whole, manifest.model_name)
    switch_caches_off(whole)
    with quiet(), silent_bars():
        model = skeleton(type(whole), config, manifest, attn_implementation)
        held = load_weights(model, manifest, folder, torch.device(device))
        if model.can_generate() and (folder / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)  # nosec B615
    model.eval()
    return Stage(manifest, model, whole, held)
