"""The traced FLOP are FlopCounterMode's: every layer and part, at the published width, for every architecture.

The reference runs every layer, unmemoised, under torch's own counter; it answers what data alone could tell (`bool`
of a meta tensor) as the tracer does.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.depth import DEEP, some
from support.models.architectures import PUBLISHED, as_stored
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from planner.profile import Tensor
from workers.checkpoint.config import ModelConfig
from workers.profiling.from_trace import flop_at
from workers.profiling.layer_parts import part_of
from workers.profiling.trace import LayerTrace, ModelTrace
from workers.profiling.tracing.counter import on_meta
from workers.profiling.tracing.inputs import make_inputs
from workers.profiling.tracing.repeats import count
from workers.profiling.tracing.skeleton import NotTraceable, build, quiet
from workers.profiling.tracing.tracer import trace

#: Models that loop over tokens in Python: a short sequence is as telling and takes a second, not twenty.
LOOPING = {"state-spaces/mamba-2.8b-hf", "ai21labs/Jamba-v0.1"}
#: One of each mechanism, as `support.models.families.TYPICAL` names them: the others are for `make test-deep`.
TYPICAL = {
    "meta-llama/Llama-3.2-1B", "google/gemma-3-4b-it", "openai-community/gpt2", "bigscience/bloom-7b1",
    "mistralai/Mixtral-8x7B-v0.1", "deepseek-ai/DeepSeek-V2-Lite", "openai/gpt-oss-20b",
    "meta-llama/Llama-4-Scout-17B-16E", "mistralai/Mamba-Codestral-7B-v0.1", "google-t5/t5-large",
    "google-bert/bert-large-uncased", "answerdotai/ModernBERT-base", "google/vit-large-patch16-224",
    "openai/clip-vit-large-patch14",
}  # fmt: skip
#: Its layers' kinds are a list as long as the model is deep; of the others eight layers have every kind.
WHOLE = {"Zyphra/Zamba2-1.2B"}
BATCH = 3


def config_of(values: dict[str, Any]) -> ModelConfig:
    return ModelConfig(values=values, model_type=values["model_type"], architecture=values["architectures"][0])


class _Truth(TorchFunctionMode):
    """Answers what only data could tell: a meta tensor asked whether it is true says yes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = func is torch.Tensor.__bool__ or (func is torch.Tensor.item and args[0].dtype is torch.bool)
        return True if asked and args[0].is_meta else func(*args, **(kwargs or {}))


class _OnMeta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Moves what a model makes on the CPU (grids of patches) to where its weights are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*on_meta(args), **(kwargs or {}))


#: Depths, wherever a config has them.
_DEPTHS = {"num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "depth"}


def shallow(values: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config with so many layers in each stack: what repeats once more proves nothing more."""
    made: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            made[key] = shallow(value, layers)
        elif key == "fullatt_block_indexes":
            made[key] = [layers - 1]
        else:
            made[key] = min(value, layers) if key in _DEPTHS else value
    return made


@functools.lru_cache(maxsize=2)
def _built(values: str) -> PreTrainedModel:
    return build(config_of(json.loads(values))).requires_grad_(requires_grad=False)


def built(values: dict[str, Any]) -> PreTrainedModel:
    """The model, built once for what a test compares."""
    return _built(json.dumps(values))


@functools.cache
def _traced(values: str, length: int) -> ModelTrace:
    return trace(config_of(json.loads(values)), names_of(json.loads(values)), sequence_length=length)


def reference(values: dict[str, Any], batch: int, length: int) -> tuple[dict[str, int], int]:
    """FLOP by module path as FlopCounterMode counts them, and in all."""
    model = built(values)
    inputs = make_inputs(model, batch, length)
    moving = _OnMeta()  # type: ignore[no-untyped-call]
    with quiet(), torch.no_grad(), _Truth(), moving, FlopCounterMode(display=False) as counter:
        model(**inputs)
    root = type(model).__name__
    paths = {
        path.removeprefix(f"{root}."): sum(counts.values())
        for path, counts in counter.get_flop_counts().items()
        if path.startswith(f"{root}.")
    }
    return paths, counter.get_total_flops()


def names_of(values: dict[str, Any]) -> dict[str, Tensor]:
    return as_stored(built(values))


def parts_of(layer: LayerTrace, paths: Mapping[str, int]) -> dict[str, int]:
    """The layer's FLOP by part, from the counter's own paths: each path's without those of the paths below it."""
    mine = {path: flop for path, flop in paths.items() if path == layer.name or path.startswith(f"{layer.name}.")}
    direct = dict(mine)
    for path, flop in mine.items():
        above = path.rpartition(".")[0]
        while above and above not in mine:
            above = above.rpartition(".")[0]
        if above:
            direct[above] -= flop
    parts: dict[str, int] = defaultdict(int)
    for path, flop in direct.items():
        parts[part_of(path[len(layer.name) + 1 :], layer.layer_type)] += flop
    return {part: flop for part, flop in parts.items() if flop}


def total(traced: ModelTrace, batch: int, length: int) -> float:
    length = min(length, traced.longest or length)
    return sum(flop_at(layer, batch, length)[0] for layer in traced.layers)


def test_at_least_forty_architectures_are_proven() -> None:
    wanted = """llama mistral mixtral qwen2 qwen3 qwen3_moe qwen3_next gemma2 gemma3 phi3 gpt2 gpt_neox gptj opt bloom
        falcon mpt olmo2 cohere2 deepseek_v3 gpt_oss glm4_moe llama4 granite starcoder2 stablelm mamba mamba2 jamba
        zamba2 t5 bart whisper bert roberta distilbert deberta modernbert vit clip siglip qwen2_5_vl llava"""
    assert set(wanted.split()) <= {values["model_type"] for values in PUBLISHED.values()}
    assert len({values["model_type"] for values in PUBLISHED.values()}) >= 40


@pytest.mark.parametrize("name", some(PUBLISHED, shallow=TYPICAL))
def test_every_layer_and_part_is_flop_counter_modes(name: str) -> None:
    values = PUBLISHED[name] if DEEP or name in WHOLE else shallow(PUBLISHED[name], 8)
    length = 53 if name in LOOPING else 331
    traced = trace(config_of(values), names_of(values), batch_size=BATCH, sequence_length=length)
    paths, all_flop = reference(values, BATCH, length)
    assert traced.reasons == ()
    assert all_flop > 0
    assert total(traced, BATCH, length) == all_flop
    for layer in traced.layers:
        flop, parts = flop_at(layer, BATCH, min(length, traced.longest or length))
        assert sum(parts.values()) == flop
        if layer.number is not None:
            assert flop == paths.get(layer.name, 0), layer.name
            # zamba2's layers share modules, which the counter knows by one path only.
            if values["model_type"] != "zamba2":
                assert {part: each for part, each in parts.items() if each} == parts_of(layer, paths), layer.name


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 333), (7, 2), (2, 447)])
@pytest.mark.parametrize(
    "name",
    some(
        [
            "meta-llama/Llama-3.2-1B",
            "google-t5/t5-large",
            "microsoft/deberta-base",
            "openai/whisper-large-v3",
            "google/gemma-3-4b-it",
            "openai/gpt-oss-20b",
        ],
        shallow={"google-t5/t5-large", "google/gemma-3-4b-it", "openai/gpt-oss-20b"},
    ),
)
def test_one_trace_answers_any_batch_and_length(name: str, batch: int, length: int) -> None:
    values = shallow(PUBLISHED[name], 6)
    traced = _traced(json.dumps(values), 256)
    assert total(traced, batch, length) == reference(values, batch, length)[1]


@pytest.mark.parametrize(
    "name",
    some(
        ["mistralai/Mamba-Codestral-7B-v0.1", "Qwen/Qwen3-Next-80B-A3B-Instruct"],
        shallow={"mistralai/Mamba-Codestral-7B-v0.1"},
    ),
)
def test_chunked_scans_are_exact_where_asked_and_say_that_the_polynomial_is_not(name: str) -> None:
    values = shallow(PUBLISHED[name], 4)
    traced = trace(config_of(values), names_of(values), batch_size=2, sequence_length=300)
    chunked = [layer for layer in traced.layers if layer.chunked]
    assert chunked
    assert traced.covers(2, 300)
    assert not traced.covers(1, 300)
    assert total(traced, 2, 300) == reference(values, 2, 300)[1]
    # Between multiples of the chunk the polynomial itself is not exact; at them it is.
    assert total(traced, 2, 300) != 2 * total(traced, 1, 300)
    assert total(traced, 1, 768) == reference(values, 1, 768)[1]


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "xlnet", "architectures": ["XLNetLMHeadModel"], "d_model": 32, "n_layer": 3, "n_head": 4},
        {"model_type": "prophetnet", "architectures": ["ProphetNetForCausalLM"], "num_decoder_layers": 2},
    ],
    ids=lambda values: values["model_type"],
)
def test_a_sum_over_one_token_is_no_matrix_product(values: dict[str, Any]) -> None:
    traced = trace(config_of(values), names_of(values), sequence_length=64)
    numbered = [layer for layer in traced.layers if layer.number is not None]
    assert {layer.terms_range and layer.terms_range[0] for layer in numbered} == {2}
    # It is what the formulas would be wrong about.
    assert total(traced, BATCH, 1) > reference(values, BATCH, 1)[1]
    assert total(traced, BATCH, 2) == reference(values, BATCH, 2)[1]


def test_layers_without_a_polynomial_are_fitted_at_lengths_that_the_model_takes() -> None:
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    values = {
        "model_type": "altclip",
        "architectures": ["AltCLIPModel"],
        "text_config": {**tower, "vocab_size": 128, "max_position_embeddings": 256},
        "vision_config": {**tower, "image_size": 32, "patch_size": 8},
    }
    traced = trace(config_of(values), names_of(values), batch_size=2, sequence_length=24)
    assert traced.longest == 256
    assert any(layer.chunked for layer in traced.layers)
    # A length that nothing was counted at.
    assert total(traced, 1, 37) == reference(values, 1, 37)[1]


def test_layers_that_are_called_past_their_hooks_cost_what_is_in_them() -> None:
    values = {"model_type": "squeezebert", "architectures": ["SqueezeBertForMaskedLM"], "num_hidden_layers": 4}
    traced = trace(config_of(values), names_of(values))
    paths, all_flop = reference(values, 1, 512)
    assert total(traced, 1, 512) == all_flop
    numbered = [layer for layer in traced.layers if layer.number is not None]
    assert len(numbered) == 4
    for layer in numbered:
        # The counter knows such a layer by its parts only.
        assert flop_at(layer, 1, 512)[0] == sum(parts_of(layer, paths).values()) > 0


def test_layers_that_differ_in_stride_alone_are_each_counted() -> None:
    values = {"model_type": "mobilenet_v1", "architectures": ["MobileNetV1ForImageClassification"], "image_size": 64}
    traced = trace(config_of(values), names_of(values))
    assert total(traced, 1, 512) == reference(values, 1, 512)[1] > 0


def test_layers_that_no_pass_reaches_are_said_to_be_uncounted() -> None:
    text = {"model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    values = {
        "model_type": "qwen2_audio",
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "text_config": {**text, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 160},
        "audio_config": {"encoder_layers": 3, "d_model": 32, "encoder_attention_heads": 4, "encoder_ffn_dim": 48},
    }
    traced = trace(config_of(values), names_of(values))
    assert traced.reasons == (
        "3 layers are not counted: the pass's text and images do not reach model.audio_tower.layers.0, ...",
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        # It takes nothing but images.
        ({"model_type": "convnext", "architectures": ["ConvNextForImageClassification"], "image_size": 8},
         "Kernel size can't be greater"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 30, "num_attention_heads": 4},
         "The hidden size .30. is not a multiple"),
    ],
)  # fmt: skip
def test_why_a_model_cannot_be_traced_is_what_transformers_says(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotTraceable, match=reason):
        trace(config_of(values), names_of(values))


#: A small model of compressed attention, with both kinds of it.
DEEPSEEK_V4 = {
    "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "sliding_window": 8,
}


def test_a_name_that_the_module_tree_knows_is_kept_where_its_renaming_is_unknown() -> None:
    traced = trace(config_of(DEEPSEEK_V4), names_of(DEEPSEEK_V4), sequence_length=64)
    at, values, share, beside = traced.tensors["model.norm.weight"]
    assert (traced.layers[at].layer_type, values, share, beside) == ("head", DEEPSEEK_V4["hidden_size"], 1.0, 0)


def test_a_layer_whose_weights_are_all_tied_need_not_be_stored() -> None:
    values = {"model_type": "udop", "architectures": ["UdopForConditionalGeneration"], "num_layers": 2}
    # Its table of relative positions is a layer by its name. (It cannot be run: it wants boxes beside text.)
    with pytest.raises(NotTraceable, match="cannot run"):
        trace(config_of(values), names_of(values))


def test_positions_end_where_the_model_says() -> None:
    traced = trace(config_of(PUBLISHED["google-bert/bert-large-uncased"]),
                   names_of(PUBLISHED["google-bert/bert-large-uncased"]))  # fmt: skip
    assert {layer.terms_range for layer in traced.layers} == {(1, 512)}


#: name -> (parameters, those that one token uses), in billions, as their publishers state them.
_STATED = {
    "mistralai/Mixtral-8x7B-v0.1": (46.7, 12.9),
    "deepseek-ai/DeepSeek-V3": (671, 37.5),
    "Qwen/Qwen3-30B-A3B": (30.5, 3.3),
    "openai/gpt-oss-20b": (20.9, 3.6),
    "zai-org/GLM-4.5-Air": (106.9, 12.6),
    "meta-llama/Llama-3.1-8B": (8.03, 8.03),
    "state-spaces/mamba-2.8b-hf": (2.77, 2.77),
}


@pytest.mark.parametrize("name", _STATED)
def test_total_and_active_parameters_are_the_published_ones(name: str) -> None:
    names = names_of(PUBLISHED[name])
    traced = trace(config_of(PUBLISHED[name]), names, sequence_length=64)
    all_parameters, active = _STATED[name]
    assert sum(values for _, values, _, _ in traced.tensors.values()) / 1e9 == pytest.approx(all_parameters, rel=0.01)
    used = sum(values * share for _, values, share, _ in traced.tensors.values())
    # Publishers count the embedding table or leave it out; both stay within its size.
    table = max(values for tensor, (_, values, _, _) in traced.tensors.items() if "embed" in tensor)
    assert active * 0.98e9 <= used <= active * 1.02e9 + table


@pytest.mark.parametrize(
    "name",
    some(
        [
            "meta-llama/Llama-3.2-1B",
            "deepseek-ai/DeepSeek-V2-Lite",
            "google/gemma-2-9b",
            "google-t5/t5-large",
            "facebook/bart-large",
            "Qwen/Qwen2.5-VL-7B-Instruct",
        ],
        shallow={"deepseek-ai/DeepSeek-V2-Lite", "google-t5/t5-large"},
    ),
)
def test_memoised_layers_change_no_activation_cache_or_peak(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = shallow(PUBLISHED[name], 6)
    names = names_of(values)
    memoised = trace(config_of(values), names, sequence_length=128)
    monkeypatch.setattr(
        "workers.profiling.tracing.tracer.count", lambda *args, **kwargs: count(*args, **{**kwargs, "memoise": False})
    )
    full = trace(config_of(values), names, sequence_length=128)
    for one, other in zip(memoised.layers, full.layers, strict=True):
        assert (one.terms, one.parts, one.once) == (other.terms, other.parts, other.once)
        assert (one.kv_per_token, one.kv_fixed, one.kv_window) == (
            other.kv_per_token,
            other.kv_fixed,
            other.kv_window,
        )
        assert one.mask == other.mask
        assert one.activation == other.activation, one.name
        assert one.peak == other.peak, one.name
