"""Small real models of many families: real runs on the CPU against the profile of their saved checkpoints.

The profile is made from files alone; the model that transformers loads from the same files then runs with real
weights, its own cache and its own loop over experts, and must agree in every number.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.depth import depth
from support.models.families import families, folder_of, load, real_inputs
from torch.utils.flop_counter import FlopCounterMode

from planner.profile import ModelProfile
from workers.checkpoint.folder import open_folder
from workers.checkpoint.headers import read_headers
from workers.generator import generate
from workers.profiling.tracing.inputs import make_inputs
from workers.profiling.tracing.skeleton import NotTraceable, quiet

BATCH, LENGTH = 2, 24

#: Run on real data only: what they look at (grids, image tokens) needs real inputs that `make_inputs` doesn't make;
#: the last gives nobody its cache, and has a test of its own.
_NO_REAL_RUN = {"llava", "qwen2_5_vl", "recurrent_gemma"}


@functools.cache
def profiled(name: str) -> ModelProfile:
    return generate(open_folder(folder_of(name)), batch_size=BATCH, sequence_length=LENGTH)


@pytest.mark.parametrize("name", families())
def test_every_tensor_is_in_one_layer_and_every_layer_has_its_own(name: str) -> None:
    folder = folder_of(name)
    profile = profiled(name)
    assert profile.approximate == ()
    placed = [tensor.name for layer in profile.layers for tensor in layer.tensors]
    headers = read_headers(open_folder(folder))
    assert sorted(placed) == sorted(tensor.name for tensor in headers.tensors)
    assert profile.total_bytes == headers.total_bytes
    assert all(layer.layer_type != "unused" for layer in profile.layers)
    with quiet():
        config = transformers.AutoConfig.from_pretrained(folder)
        model, info = getattr(transformers, config.architectures[0]).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert profile.missing_tensors == ()
    # Without the model's code, too: the buffers that its checkpoint carries are told by their names.
    assert generate(open_folder(folder), compute=False).total_params == profile.total_params
    # What the loaded model holds below a layer's name, tied weights once, is what the profile says that it has.
    assert profile.total_params == sum(each.numel() for each in model.parameters())
    counted: set[int] = set()
    for layer in sorted(profile.layers, key=lambda each: each.index):
        if not layer.name.rpartition(".")[2].isdecimal():
            continue
        mine = {id(each): each.numel() for each in model.get_submodule(layer.name).parameters()}
        assert layer.num_params == sum(n for key, n in mine.items() if key not in counted), layer.name
        counted |= mine.keys()


@pytest.mark.parametrize("name", families(without=_NO_REAL_RUN))
def test_a_real_run_costs_and_caches_what_the_profile_says(name: str) -> None:
    profile = profiled(name)
    output, flop = real_run(load(name), BATCH, LENGTH)
    assert profile.total_compute == flop
    assert sum(layer.kv_cache_bytes for layer in profile.layers) == cached_bytes(output)
    first = next(iter(output.values()))
    assert profile.layers[-1].activation_bytes >= first.numel() * first.element_size()


def real_run(model: Any, batch: int, length: int) -> tuple[Any, int]:
    """A pass with data: what it gave, and its FLOP."""
    made = make_inputs(model, batch, length)
    taken = {"use_cache": True} if "use_cache" in made else {}
    with quiet(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        return model(**real_inputs(made), **taken), counter.get_total_flops()


def cached_bytes(output: Any) -> int:
    """Bytes of all floating tensors in the cache of a real pass."""
    cache = getattr(output, "past_key_values", None) or getattr(output, "cache_params", None)
    parts = (getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None))
    kept = [
        value for part in parts for layer in getattr(part, "layers", ()) for each in vars(layer).values()
        for value in (each.values() if isinstance(each, dict) else [each])
    ]  # fmt: skip
    floats = {id(each): each for each in kept if isinstance(each, torch.Tensor) and each.is_floating_point()}
    return sum(each.numel() * each.element_size() for each in floats.values())


#: The window of those that have one is 8 tokens, so that 7 stay; position tables end at 64, 32 (whisper), 24 (clip).
_LENGTHS = depth((1, 7, 8, 9, 60), (1, 5, 7, 8, 9, 16, 21, 60))
#: Where no formula holds at all lengths; a single token may be taken as a generated one.
_ESTIMATED = {
    "mamba2": _LENGTHS,
    "clip": _LENGTHS,
    "qwen3_next": _LENGTHS,
    "deepseek_v4": _LENGTHS,
    "minimax": _LENGTHS,
    "mamba": (1,),
    "lfm2_moe": (1,),
    "jamba": (1,),
}


@pytest.mark.parametrize("name", families(without=_NO_REAL_RUN))
def test_cost_and_cache_at_other_lengths_are_right_or_said_to_be_estimates(name: str) -> None:
    model = load(name)
    for length in _LENGTHS:
        profile = profiled(name).at(batch_size=BATCH, sequence_length=length)
        output, flop = real_run(model, BATCH, length)
        told = profile.total_compute, sum(layer.kv_cache_bytes for layer in profile.layers)
        if not profile.approximate or length not in _ESTIMATED.get(name, ()):
            assert (told, profile.approximate) == ((flop, cached_bytes(output)), ()), length


@pytest.mark.parametrize("length", [2, 5, 8, LENGTH, 60])
def test_states_that_modules_keep_themselves_are_cached(length: int) -> None:
    model = load("recurrent_gemma")
    cache = transformers.DynamicCache(config=model.config)
    tokens = torch.randint(3, 90, (BATCH, length))
    with quiet(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    kept = [vars(module).get(name) for module in model.modules() for name in ("conv1d_state", "recurrent_states")]
    states = sum(each.numel() * each.element_size() for each in kept if each is not None)
    profile = profiled("recurrent_gemma").at(batch_size=BATCH, sequence_length=length)
    assert states > 0
    assert sum(layer.kv_cache_bytes for layer in profile.layers) == states + cached_bytes(
        SimpleNamespace(past_key_values=cache)
    )
    assert (profile.total_compute, profile.approximate) == (counter.get_total_flops(), ())


@pytest.mark.parametrize("name", ["deepseek_v4", "ernie4_5_moe"])
def test_a_model_that_cannot_be_run_still_tells_its_parameters_from_its_buffers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise NotTraceable("no")

    monkeypatch.setattr("workers.profiling.tracing.tracer._Tracer.run", refuse)
    monkeypatch.setattr("workers.profiling.contents._BALANCES_OF", {})
    profile = generate(open_folder(folder_of(name)))
    assert profile.approximate[-1] == "no"
    assert profile.total_params == profiled(name).total_params


def test_kv_dtype_shrinks_keys_and_values_but_no_state() -> None:
    wide = profiled("lfm2_moe")
    folder = open_folder(folder_of("lfm2_moe"))
    narrow = generate(folder, batch_size=BATCH, sequence_length=LENGTH, kv_dtype="float8_e4m3fn")
    for one, other in zip(wide.layers, narrow.layers, strict=True):
        assert one.kv_terms is None or other.kv_terms is not None
        if one.kv_terms is not None and other.kv_terms is not None:
            assert other.kv_terms.bytes_per_token * 4 == one.kv_terms.bytes_per_token
            assert other.kv_terms.fixed_bytes == one.kv_terms.fixed_bytes


def test_a_window_bounds_the_cache() -> None:
    profile = generate(open_folder(folder_of("mistral")), sequence_length=60)
    layer = profile.layers[1]
    assert layer.kv_terms is not None
    assert layer.kv_terms.window_tokens == 7
    assert layer.kv_cache_bytes == 7 * 2 * 2 * 8 * 4
    assert layer.compute_min is not None
    # 60 queries see at most 8 keys each instead of 60: 1 + ... + 7 + 53 * 8 pairs of 3600; 4 heads of 8 values.
    assert layer.compute_required - layer.compute_min == (3600 - 28 - 53 * 8) * 4 * 4 * 8
