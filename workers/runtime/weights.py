"""A stage's model: the whole model's code, with the weights of one shard.

They are loaded with transformers' own functions, as from a checkpoint: names and layouts converted, weights tied,
dtypes kept. Weights of other shards take no memory.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import initialization as init

from planner.errors import InvalidCheckpoint
from workers.checkpoint.config import ModelConfig
from workers.shards.manifest import Manifest

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: torch's class for modules is patched while a skeleton is made, by one thread at a time.
_BUILDING = threading.Lock()


def skeleton(kind: type[Any], config: ModelConfig, manifest: Manifest, attention: str | None) -> Any:
    """The whole model, its parameters on the meta device and its computed buffers real."""
    described = transformers.CONFIG_MAPPING[str(config.model_type)].from_dict(dict(config.values))
    stored = [_DTYPES[t.dtype] for t in manifest.tensors if t.dtype in _DTYPES]
    dtype = described.dtype or (stored[0] if stored else torch.float32)
    chosen = {} if attention is None else {"attn_implementation": attention}
    with _parameters_on_meta(), init.no_init_weights():
        model = kind._from_config(described, dtype=dtype, **chosen)  # noqa: SLF001 (from_config without downloads)
    switch_caches_off(model)
    return model


def switch_caches_off(model: nn.Module) -> None:
    """Switch caches off: what they hold would be lost between stages."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "use_cache", None):
            config.use_cache = False


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, modules get their parameters without memory (as accelerate's init_empty_weights, buffers real)."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        made = module._parameters.get(name)  # noqa: SLF001
        if made is not None and not made.is_meta:
            empty = nn.Parameter(made.to("meta"), requires_grad=False)
            empty.__dict__.update(made.__dict__)
            module._parameters[name] = empty  # noqa: SLF001

    with _BUILDING:
        nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]


def load_weights(model: Any, manifest: Manifest, folder: Path, device: torch.device) -> frozenset[str]:
    """Load the shard's weights by transformers' own rules; the names of those that the model has now."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    dtype = model.dtype
    settings = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),  # noqa: SLF001
        weight_mapping=cast("Any", get_model_conversion_mapping(model)),
    )
    with ExitStack() as files:
        state: dict[str, Any] = {}
        for file in manifest.files:
            opened = files.enter_context(safe_open(folder / file.name, framework="pt", device="cpu"))
            state |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        untied = [name for name in manifest.twins if name not in model.all_tied_weights_keys]
        state |= {name: state[manifest.aliases[name]] for name in untied}
        info, _ = convert_and_load_state_dict_in_model(model, state, settings)
    wrong = sorted(str(name) for name in info.mismatched_keys) + sorted(map(str, info.conversion_errors))
    if wrong:
        raise InvalidCheckpoint(
            f"{len(wrong)} weights of {folder} do not fit {type(model).__name__}, such as {wrong[0]}",
            details={"weights": wrong[:20]},
        )
    missing = set(info.missing_keys)
    missing -= _made_by_rule(model, missing)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            # Not on meta: models ask their weights for device and dtype.
            hollow = nn.Parameter(_hollow(parameter, device), requires_grad=False)
            model.get_submodule(owner)._parameters[leaf] = hollow  # noqa: SLF001
            missing.add(name)
    for module in model.modules():
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None:
                module._buffers[name] = buffer.to(device)  # noqa: SLF001
    return frozenset(model.state_dict()) - missing


def _made_by_rule(model: Any, missing: Collection[str]) -> set[str]:
    """Make the weights that checkpoints leave out because a formula gives them (sinusoidal positions); their names.

    transformers names them among those that may be missing, but also some that it then draws at random. So each is
    made twice, from different seeds: what differs is no formula's.
    """
    patterns = model._keys_to_ignore_on_load_missing or ()  # noqa: SLF001
    made = set()
    for name in sorted(missing):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        like = module._parameters.get(leaf)  # noqa: SLF001
        tied = name in model.all_tied_weights_keys
        if like is None or tied or len(module._parameters) > 1:  # noqa: SLF001
            continue
        if not any(re.search(pattern, name) for pattern in patterns):
            continue
        tries = []
        with torch.random.fork_rng(devices=[]):
            for seed in (1, 2):
                torch.manual_seed(seed)
                tries.append(nn.Parameter(torch.empty(like.shape, dtype=like.dtype), requires_grad=False))
                module._parameters[leaf] = tries[-1]  # noqa: SLF001
                model._init_weights(module)  # noqa: SLF001
        if torch.equal(tries[0], tries[1]):
            made.add(name)
        else:
            module._parameters[leaf] = like  # noqa: SLF001
    return made


def _hollow(like: Tensor, device: torch.device) -> Tensor:
    """A tensor of that shape and dtype in one element's memory: NaN, so that a use of it shows in the output."""
    return torch.full((), filler(like.dtype), dtype=like.dtype, device=device).expand(like.shape)


def filler(dtype: torch.dtype) -> float:
    """The value of tensors that are not here: NaN, so that a use of them shows in the output."""
    return float("nan") if dtype.is_floating_point or dtype.is_complex else 0


@contextmanager
def silent_bars() -> Iterator[None]:
    """Within, transformers shows no progress bars."""
    bars: Any = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
