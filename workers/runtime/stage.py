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

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from planner.errors import Conflict, InvalidInput, NotFound
from workers.checkpoint.config import parse_config
from workers.profiling.tracing.skeleton import NotTraceable, build, first_line, quiet
from workers.runtime.dataflow import Trace, Visit, calling, find_units, observed, plan_visit, replayed, trace
from workers.runtime.payload import Handoff
from workers.runtime.weights import filler, load_weights, silent_bars, skeleton, switch_caches_off
from workers.shards.manifest import Manifest, read_manifest

_TRACES = 64


class _Stop(Exception):
    """The last call of this visit has run."""


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
        self._units = find_units(whole, [name for names in manifest.nodes.values() for name in names])
        #: Names of the weights and buffers that this shard brought.
        self._there = there
        missing = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in there]
        #: Paths of the units whose weights are all here.
        self.held = frozenset(unit for unit in self._units if not any(n.startswith(f"{unit}.") for n in missing))
        self._traces: dict[Any, Trace] = {}

    def can(self, key: str) -> bool:
        """Whether this stage holds a unit's weights (by module path), or a single one (by `=` or `~` and name)."""
        return key[1:] in self._there if key[0] in "=~" else key in self.held

    @torch.no_grad()
    def forward(self, step: Handoff) -> Any:
        """Run what this stage holds and can run now.

        Returns:
            A `Handoff` for the node that holds what is to run next, or the model's output after the last layer.

        Raises:
            Conflict: If the handoff is of another plan or revision, or there is nothing for this stage to do yet.
            InvalidInput: If the model cannot be divided for such inputs.
        """
        self._check(step)
        found = self._trace(step.inputs)
        visit = plan_visit(found, step.values, self.can)
        if visit.next_module is not None and not visit.compute:
            raise Conflict(
                f"node {self.manifest.node_id} holds nothing that can run now: {visit.next_module} is next, on "
                f"another node",
                details={"next_module": visit.next_module, "held": sorted(self.held)},
            )
        run = _Run(found, visit, step.values, self.model.device)
        with calling(self.model, self._units, run), self._lent(step.values):
            try:
                output = self.model(**step.inputs)
            except _Stop:
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
        return Handoff(
            inputs=step.inputs,
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

    def _trace(self, inputs: Mapping[str, Any]) -> Trace:
        """The dataflow for inputs of these shapes; remembered."""
        key = tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(inputs.items()))
        if key not in self._traces:
            with quiet():
                try:
                    found = trace(self._whole[0], self._units, inputs)
                except Exception as error:
                    raise InvalidInput(
                        f"{self.manifest.model_name} cannot be run in stages on these inputs: {_reason(error)}"
                    ) from error
            if len(self._traces) >= _TRACES:
                self._traces.clear()
            self._traces[key] = found
        return self._traces[key]

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


def _reason(error: Exception) -> str:
    """Why a model could not be traced, in a line."""
    if isinstance(error, NotImplementedError) and "data-independent" in str(error):
        return "the shapes within it depend on values, as those of Switch Transformers' experts do"
    if "on meta tensors" in str(error):
        return "its code looks at tensors' values, as LLaVA's does at those of images"
    if "expected device" in str(error):
        return "its code makes tensors on the CPU wherever the others are, as XLNet's does"
    return first_line(error)


class _Run:
    """The runner of one visit (see `workers.runtime.dataflow.calling`)."""

    def __init__(self, found: Trace, visit: Visit, ready: Mapping[str, Tensor], device: torch.device) -> None:
        self.made: dict[str, Tensor] = {}
        self._calls = {(call.path, call.number): call for call in found.calls}
        self._compute, self._last = set(visit.compute), visit.compute[-1] if visit.next_module else None
        self._hand_on, self._ready, self._device = visit.hand_on, ready, device
        self._counts: dict[str, int] = defaultdict(int)
        #: (identity, version) -> (what is copied, so that its identity stays its own; the copy).
        self._copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, path: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = (path, self._counts[path])
        self._counts[path] += 1
        if place not in self._calls:
            raise InvalidInput(f"{path} ran more often than in the trace: its calls depend on the data")
        call = self._calls[place]
        if place not in self._compute:
            parts = [self._part(call.key(at), part) for at, part in enumerate(call.parts)]
            return replayed(call, parts, args, kwargs)
        output, told = observed(run, args, kwargs)
        for at, part in enumerate(pytree.tree_leaves((output, told))):
            if call.key(at) in self._hand_on:
                self.made[call.key(at)] = self._copy(part)
        if place == self._last:
            raise _Stop
        return output

    def _part(self, key: str, part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        if key in self._ready:
            return self._copy(self._ready[key])
        # Real memory, unlike weights that are not here: models write to hidden states in place.
        return torch.full(part.shape, filler(part.dtype), dtype=part.dtype, device=self._device)

    def _copy(self, value: Tensor) -> Tensor:
        """A copy that in-place code between the layers cannot reach; the same one for the same value."""
        place = (id(value), value._version)  # noqa: SLF001 (how often it was written to)
        if place not in self._copies:
            self._copies[place] = (value, value.clone())
        return self._copies[place][1]


def load_stage(
    path: str | Path, *, device: torch.device | str = "cpu", attn_implementation: str | None = None
) -> Stage:
    """The layers of the shard in `path`, ready to run; memory is that of their weights.

    Args:
        path: A finished shard, as `workers.splitter.split` writes it.
        device: Where the weights go.
        attn_implementation: As in `from_pretrained`; default that of transformers.

    Raises:
        NotFound: If there is no finished shard.
        IntegrityError: If its manifest cannot be read.
        InvalidInput: If transformers has no code of its own for the model, or it is quantised.
        InvalidCheckpoint: If the weights do not fit the model.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    try:
        config = parse_config((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise NotFound(f"{folder} has no config.json, so it cannot be run") from None
    if config.quantization:
        raise InvalidInput(f"{manifest.model_name} is quantised; stages of such models cannot be run yet")
    # transformers writes infinities as {"__float__": "Infinity"}, and its from_dict does not take them so.
    values = transformers.PretrainedConfig._decode_special_floats(dict(config.values))  # noqa: SLF001
    config = replace(config, values=values)
    try:
        whole = build(config)
    except NotTraceable as error:
        raise InvalidInput(f"{manifest.model_name} cannot be run in stages: {error}") from error
    switch_caches_off(whole)
    with quiet(), silent_bars():
        model = skeleton(type(whole), config, manifest, attn_implementation)
        held = load_weights(model, manifest, folder, torch.device(device))
    model.eval()
    return Stage(manifest, model, whole, held)
