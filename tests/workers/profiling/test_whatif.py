"""What a profile says of other batch sizes and lengths, and of memory, against profiles made there and real runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.depth import some
from support.models.families import families, folder_of, load, real_inputs
from torch.profiler import ProfilerActivity

from planner.profile import Layer, ModelProfile
from planner.wire import read as wire
from workers.checkpoint.folder import open_folder
from workers.generator import generate
from workers.profiling.tracing.inputs import make_inputs
from workers.profiling.tracing.skeleton import quiet

#: Their scans are padded to a chunk, so that no polynomial is exact at other lengths.
_CHUNKED = {"mamba2", "qwen3_next", "deepseek_v4", "minimax"}


#: The product of all texts with all images grows with the square of the batch.
_FLAGGED = {"clip": {"text_projection"}}


def without_peak(layer: Layer) -> Layer:
    """The figures; a peak is the larger of several polynomials, of which one is kept."""
    return replace(layer, peak_bytes=0, peak_terms=None)


def without_peaks(profile: ModelProfile) -> list[Layer]:
    return [without_peak(each) for each in profile.layers]


def longest(profile: ModelProfile, length: int) -> int:
    return min(length, profile.longest_sequence or length)


@pytest.mark.parametrize("name", families(without=_CHUNKED))
def test_another_batch_and_length_cost_what_a_profile_made_there_says(name: str) -> None:
    folder = open_folder(folder_of(name))
    profile = generate(folder, batch_size=1, sequence_length=48)
    # As a planner reads it: parts, least compute and activations go through the metadata, too.
    read = wire.profile_from_json(wire.profile_to_json(profile))
    asked = read.at(batch_size=3, sequence_length=29)
    made = generate(folder, batch_size=3, sequence_length=29)
    flagged = {layer.name for layer in read.layers if layer.terms_range == (longest(read, 48),) * 2}
    assert flagged <= _FLAGGED.get(name, set())
    for one, other in zip(asked.layers, made.layers, strict=True):
        assert one.name in flagged or without_peak(one) == without_peak(other)
        assert one.peak_bytes == pytest.approx(other.peak_bytes, rel=0.4, abs=4096), one.name
    assert without_peaks(asked.at(batch_size=1, sequence_length=48)) == without_peaks(read)


def real_peaks(name: str, profile: ModelProfile) -> dict[str, int]:
    """Layer -> the most bytes that torch's allocator gave out while it ran, beyond what is kept for later tokens."""
    model = load(name)
    made = make_inputs(model, profile.batch_size, profile.sequence_length)

    def run(open_ranges: list[Any]) -> Any:
        # The inputs are part of the working set, so they are made inside.
        inputs = real_inputs(made)

        def enters(name: str) -> None:
            open_ranges.append(torch.ops.profiler._record_function_enter_new(f"layer {name}", None))

        hooks = [
            model.get_submodule(layer.name).register_forward_pre_hook(lambda *_, name=layer.name: enters(name))
            for layer in profile.layers
            if layer.name in dict(model.named_modules())
        ]
        try:
            with torch.no_grad(), quiet():
                return model(**inputs, **({"use_cache": True} if "use_cache" in made else {}))
        finally:
            for hook in hooks:
                hook.remove()
            for each in open_ranges:
                torch.ops.profiler._record_function_exit._RecordFunction(each)

    run([])
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = run([])
    del output
    events = profiler.profiler.kineto_results.events()
    starts = sorted((each.start_ns(), each.name()[6:]) for each in events if each.name().startswith("layer "))
    changes = sorted((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]")
    kept = {layer.name: layer.kv_cache_bytes for layer in profile.layers}
    peaks: dict[str, int] = {}
    live, held, at, name = 0, 0, 0, ""
    for when, change in changes:
        while at < len(starts) and starts[at][0] <= when:
            # What the layer before has cached stays; what this one caches is its own KV cache, not its working set.
            held += kept.get(name, 0)
            name, at = starts[at][1], at + 1
            peaks[name] = max(peaks.get(name, 0), live - held)
        live += change
        if name:
            peaks[name] = max(peaks[name], live - held)
    return peaks


@pytest.mark.parametrize(
    "name",
    some(
        ["llama", "gpt2", "qwen3", "granite", "olmoe", "gpt_neox", "bert", "t5", "opt"],
        shallow={"llama", "olmoe", "t5"},
    ),
)
def test_peaks_are_those_of_torchs_allocator(name: str) -> None:
    profile = generate(open_folder(folder_of(name)), batch_size=2, sequence_length=60)
    real = real_peaks(name, profile)
    stacks = [layer for layer in profile.layers if layer.name.rpartition(".")[2].isdecimal()]
    assert stacks
    for layer in stacks:
        # Its own KV cache may or may not be there yet when the working set is largest.
        low, high = real[layer.name] - layer.kv_cache_bytes, real[layer.name]
        assert low * 0.95 <= layer.peak_bytes <= high * 1.2 + 4096, (layer.name, layer.peak_bytes, low, high)
