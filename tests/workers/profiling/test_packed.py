"""Packed weights count as many parameters as their modules have, and what a checkpoint lacks is named.

The counts are those of transformers' own classes; what is missing is what its loader says of real weights.
"""

from __future__ import annotations

import functools
import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.cases import make as cases
from support.models.packings import PACKINGS, Tensors, stated

from planner.errors import InvalidCheckpoint
from planner.profile import ModelProfile, Tensor
from workers.checkpoint.config import ModelConfig, parse_config
from workers.checkpoint.folder import open_folder
from workers.checkpoint.headers import read_headers
from workers.generator import generate
from workers.profiling.tracing.places import Places
from workers.profiling.tracing.skeleton import build, quiet
from workers.profiling.tracing.tracer import _Tracer

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
MOE: dict[str, Any] = {
    **LLAMA, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "head_dim": 32,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "hidden_size": 128, "num_hidden_layers": 1,
}  # fmt: skip
#: Right before there was one rule for all, without the model's class, too.
LONG_KNOWN = (
    "gptq",
    "auto-round4",
    "awq4-gemm",
    "bnb",
    "fp8",
    "eetq",
    "bitnet",
    "ct-pack4",
    "ct-nvfp4",
    "modelopt-nvfp4",
)


def config_of(values: dict[str, Any]) -> ModelConfig:
    return parse_config(json.dumps(values).encode())


@functools.cache
def tracer(values: str) -> _Tracer:
    return _Tracer(config_of(json.loads(values)))


@functools.cache
def shapes(values: str) -> dict[str, list[int]]:
    """Names and shapes as the config's checkpoints have them: experts one by one."""
    found: dict[str, list[int]] = {}
    for name, each in build(config_of(json.loads(values))).named_parameters():
        module, _, last = name.rpartition(".")
        if not module.endswith(".experts"):
            found[name] = list(each.shape)
            continue
        for expert in range(each.shape[0]):
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
            rows = each.shape[1] // len(parts)
            found |= {f"{module}.{expert}.{part}.weight": [rows, each.shape[2]] for part in parts}
    return found


def packed(values: dict[str, Any], packing: str, only: str = "_proj.weight") -> Tensors:
    """The tensors of a checkpoint whose projections are packed."""
    tensors: Tensors = {}
    for name, shape in shapes(json.dumps(values)).items():
        if name.endswith(only):
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{last}": each for last, each in PACKINGS[packing](*shape).items()}
        else:
            tensors[name] = ("BF16", shape)
    return tensors


def places(values: dict[str, Any], tensors: Tensors) -> Places:
    stored, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * cases.BITS[dtype] // 8
        stored[name] = Tensor(name=name, file="m", dtype=dtype, shape=tuple(shape), begin=begin, end=end)
    return tracer(json.dumps(values)).place(stored)


def counted(values: dict[str, Any], tensors: Tensors) -> dict[int, int]:
    """Parameters of each layer."""
    found: dict[int, int] = {}
    for place in places(values, tensors).of.values():
        found[place.layer] = found.get(place.layer, 0) + place.values
    return found


def folder_of(folder: Path, values: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    cases.write_zeros(folder / "model.safetensors", tensors)
    return folder


def bytes_in(folder: Path) -> int:
    return read_headers(open_folder(folder)).total_bytes


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_module_has_its_own_parameters(packing: str) -> None:
    tensors = packed(LLAMA, packing)
    found = places(LLAMA, tensors)
    assert counted(LLAMA, tensors) == counted(LLAMA, packed(LLAMA, "bf16"))
    assert found.missing() == ()
    # One tensor of each module is the packed form; the others lie beside it, and are no layer's loss.
    assert sum(place.values > 0 for place in found.of.values()) == len(shapes(json.dumps(LLAMA)))
    assert all(place.layer >= 0 and (place.values > 0) != place.beside for place in found.of.values())


@pytest.mark.parametrize("packing", PACKINGS)
def test_without_the_class_a_count_is_right_or_not_known(packing: str, tmp_path: Path) -> None:
    tensors = packed(LLAMA, packing)
    folder = folder_of(tmp_path / "m", {**LLAMA, "quantization_config": stated(packing)}, tensors)
    profile = generate(open_folder(folder), compute=False)
    # A bias that quantisation made up, all zeros, is one by its name.
    made_up = 2 * (128 * 3 + 64 * 2 + 256 * 2) if packing == "gptq4-with-bias" else 0
    right = 426_624 + made_up
    assert profile.total_params in ({right} if packing.startswith(LONG_KNOWN) else {right, None})
    assert (profile.total_params is None) == any("parameters not known" in each for each in profile.approximate)
    assert profile.total_bytes == bytes_in(folder)
    assert profile.missing_tensors is None
    assert all(layer.compute_required > 0 for layer in profile.layers[1:])


@pytest.mark.parametrize(
    "packing", ["gptq4", "awq4-gemm", "fp8-blocks", "ct-nvfp4", "bnb-int8", "exl3", "mlx4", "hqq4"]
)
def test_experts_stored_one_by_one_share_the_parameters_of_the_one_that_runs(packing: str) -> None:
    tensors = packed(MOE, packing)
    assert counted(MOE, tensors) == counted(MOE, packed(MOE, "bf16"))
    assert places(MOE, tensors).missing() == ()
    # Some experts left as they were, and one that is not there.
    plain = packed(MOE, "bf16")
    mixed = {name: each for name, each in tensors.items() if ".experts.2." not in name}
    expert = {name: each for name, each in plain.items() if ".experts.2." in name}
    assert counted(MOE, mixed | expert) == counted(MOE, plain)
    lost = places(MOE, mixed)
    assert lost.missing() == tuple(sorted(expert))
    assert sum(place.values for place in lost.of.values()) == sum(
        prod(s) for n, (_, s) in plain.items() if n not in expert
    )


def test_all_of_mlx_is_packed_the_embedding_and_the_head_too() -> None:
    tensors = packed(LLAMA, "mlx4", only=("_proj.weight", "embed_tokens.weight", "lm_head.weight"))  # type: ignore[arg-type]
    assert counted(LLAMA, tensors) == counted(LLAMA, packed(LLAMA, "bf16"))


@pytest.mark.parametrize(
    ("tensor", "stored"),
    [
        ("model.layers.1.mlp.up_proj.weight", ("BF16", [128, 128])),
        ("model.layers.1.mlp.up_proj.weight", ("F8_E4M3", [128, 128])),
        ("model.layers.1.mlp.up_proj.weight", ("U8", [4096, 128])),
        ("model.norm.weight", ("BF16", [64])),
        ("model.norm.weight", ("U8", [1])),
    ],
)
def test_what_is_no_packed_form_of_its_module_is_refused(tensor: str, stored: tuple[str, list[int]]) -> None:
    with pytest.raises(InvalidCheckpoint, match=rf"tensor {tensor} holds .* values, but config\.json makes"):
        places(LLAMA, packed(LLAMA, "bf16") | {tensor: stored})


@pytest.mark.parametrize("name", cases.named("quant"))
def test_cases_of_packed_weights(name: str, tmp_path: Path) -> None:
    expect = cases.make(name, tmp_path)
    profile = generate(open_folder(tmp_path))
    assert profile.total_params == expect["num_params"]
    assert profile.total_bytes == bytes_in(tmp_path)
    assert 0 < profile.overhead_bytes < profile.total_bytes
    assert profile.missing_tensors == ()
    assert all(layer.layer_type != "unused" for layer in profile.layers)
    assert not any("parameters" in reason for reason in profile.approximate)
    # FLOP and KV cache are the unquantised model's.
    config = json.loads((tmp_path / "config.json").read_text())
    plain = generate(open_folder(_unquantised(tmp_path / "plain", config)))
    assert costs(profile) == costs(plain)


def _unquantised(folder: Path, config: dict[str, Any]) -> Path:
    config.pop("quantization_config", None)
    config.get("text_config", {}).pop("quantization_config", None)
    with quiet():
        model = build(config_of(config))
    tensors: Tensors = {name: ("BF16", list(each.shape)) for name, each in model.named_parameters()}
    return folder_of(folder, config, tensors)


def costs(profile: ModelProfile) -> list[tuple[Any, ...]]:
    return [(each.name, each.num_params, each.active_params, each.compute_required, each.kv_cache_bytes)
            for each in profile.layers]  # fmt: skip


@pytest.mark.parametrize("name", cases.named("missing"))
def test_cases_of_missing_tensors(name: str, tmp_path: Path) -> None:
    expect = cases.make(name, tmp_path)
    profile = generate(open_folder(tmp_path), cache_dir=tmp_path / "traces")
    assert profile.missing_tensors == tuple(expect["missing"])
    assert profile.total_params == expect.get("num_params", profile.total_params)
    # From the cache, too; and where the class is not asked, nobody looked.
    assert generate(open_folder(tmp_path), cache_dir=tmp_path / "traces").missing_tensors == profile.missing_tensors
    assert generate(open_folder(tmp_path), compute=False).missing_tensors is None


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("llama", ("model.norm.weight",)),
        ("llama", ("lm_head.weight", "model.layers.2.self_attn.")),
        ("llama_tied", ("model.embed_tokens.weight",)),
        ("t5", ("shared.weight", "encoder.block.1.layer.0.SelfAttention.q.weight")),
        ("bart", ("model.shared.weight",)),
        ("gpt2_hub", ("wpe.weight", "h.1.mlp.c_fc.bias")),
        ("bert", ("pooler.", "embeddings.position_embeddings.weight")),
        ("bert_mlm", ("cls.predictions.decoder.bias", "cls.predictions.bias")),
        ("mamba2", ("backbone.layers.1.mixer.A_log",)),
        ("mixtral", ("model.layers.0.mlp.gate.weight", "model.layers.1.self_attn.q_proj.weight")),
    ],
)
def test_what_is_missing_is_what_the_loader_of_real_weights_says(
    name: str, lost: tuple[str, ...], tmp_path: Path
) -> None:
    folder = checkpoints.copy_of(name, tmp_path)
    state = load_file(folder / "model.safetensors")
    kept = {name: each for name, each in state.items() if not name.startswith(lost)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    with quiet():
        _, info = getattr(transformers, config["architectures"][0]).from_pretrained(folder, output_loading_info=True)
    assert places_of(folder).missing() == tuple(sorted(info["missing_keys"]))
    assert kept.keys() != state.keys()


def places_of(folder: Path) -> Places:
    """The places of a folder's tensors."""
    config = json.loads((folder / "config.json").read_text())
    headers = read_headers(open_folder(folder))
    return _Tracer(config_of(config)).place({tensor.name: tensor for tensor in headers.tensors})


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_nothing_is_missing_from_what_transformers_saved(name: str) -> None:
    assert places_of(checkpoints.checkpoint(name)).missing() == ()


def test_one_expert_that_is_missing_is_named_as_the_checkpoint_names_it(tmp_path: Path) -> None:
    for name in ("mixtral", "deepseek_v3"):
        folder = checkpoints.copy_of(name, tmp_path / name)
        state = load_file(folder / "model.safetensors")
        lost = next(each for each in sorted(state) if ".experts.2." in each)
        del state[lost]
        save_file(state, folder / "model.safetensors")
        assert places_of(folder).missing() == (lost,)


def test_a_model_that_cannot_be_run_without_weights_still_says_what_it_lacks(tmp_path: Path) -> None:
    expect = cases.make("untraceable-longcat-flash", tmp_path)
    profile = generate(open_folder(tmp_path))
    assert (profile.total_params, profile.missing_tensors) == (expect["num_params"], ())
    tensors = cases.case("untraceable-longcat-flash")["files"]["model.safetensors"]["tensors"]
    lost = "model.layers.1.self_attn.0.o_proj.weight"
    cases.write_zeros(tmp_path / "model.safetensors", {name: each for name, each in tensors.items() if name != lost})
    assert generate(open_folder(tmp_path)).missing_tensors == (lost,)
