"""Stages from shards: whatever the plan, the chain's output is the whole model's, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import NAMES, checkpoint, minilm
from support.depth import some
from support.stage_cases import assert_equal, chain, contiguous, cut, example, scattered, tensors, whole

from planner.errors import Conflict, InvalidCheckpoint, InvalidInput, NotFound
from workers.runtime.payload import Handoff
from workers.splitter import load_stage

DECODERS = (
    "llama",
    "llama_bf16",
    "llama_tied",
    "llama_files",
    "qwen2",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gemma2",
)
OTHERS = ("gemma3", "phi3", "gpt2", "gpt2_hub", "bert", "bert_mlm", "t5", "bart", "mamba2")
#: For `make test`: the others are built of the same.
TYPICAL = {"llama_tied", "deepseek_v3", "gemma3", "gpt2_hub", "bert_mlm", "t5", "mamba2"}


@pytest.mark.parametrize("name", some(NAMES, shallow=TYPICAL))
def test_a_chain_of_stages_is_the_whole_model_bit_for_bit(name: str, tmp_path: Path) -> None:
    stages = [load_stage(shard) for shard in cut(checkpoint(name), tmp_path, contiguous, 3, exact=True)]
    model = whole(checkpoint(name))
    inputs = example(model)
    output, ran = chain(stages, inputs)
    with torch.no_grad():
        assert_equal(output, model(**inputs))
    if not model.config.is_encoder_decoder:
        assert ran == ["n0", "n1", "n2"]


@pytest.mark.parametrize("name", some(["llama", "gemma3", "bert", "t5", "bart", "mamba2"], shallow={"gemma3", "t5"}))
def test_layers_dealt_out_like_cards_still_make_the_model(name: str, tmp_path: Path) -> None:
    stages = [load_stage(shard) for shard in cut(checkpoint(name), tmp_path, scattered, 3)]
    model = whole(checkpoint(name))
    inputs = example(model)
    output, ran = chain(stages, inputs)
    assert len(ran) > 3, "the request comes by each node more than once"
    with torch.no_grad():
        assert_equal(output, model(**inputs))


@pytest.mark.parametrize(
    ("model_type", "architecture", "settings"),
    [
        # The last layers use keys that earlier ones left in a mapping.
        ("gemma3n_text", "Gemma3nForCausalLM", {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 160,
            "laurel_rank": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.0] * 4, "sliding_window": 8}),
        # Positions by formula, which no checkpoint holds.
        ("marian", "MarianMTModel", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}),
        # One layer's weights, run four times.
        ("albert", "AlbertForMaskedLM", {"embedding_size": 16}),
    ],
)  # fmt: skip
def test_what_other_architectures_do(
    model_type: str, architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    common = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
              "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    config = transformers.AutoConfig.for_model(model_type, **(common | settings))
    source = tmp_path / "own" / model_type
    torch.manual_seed(0)
    getattr(transformers, architecture)(config).save_pretrained(source)
    stages = [load_stage(shard) for shard in cut(source, tmp_path / "shards", contiguous, 3, exact=True)]
    model = whole(source)
    inputs = example(model)
    with torch.no_grad():
        assert_equal(chain(stages, inputs)[0], model(**inputs))


@pytest.mark.parametrize(
    ("model_type", "architecture", "settings", "reason"),
    [
        ("rwkv", "RwkvForCausalLM", {"attention_hidden_size": 32}, "writes into weights that other nodes hold"),
        ("switch_transformers", "SwitchTransformersForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 64,
            "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "num_experts": 4,
            "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}, "the shapes within it depend on values"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_in_stages_says_so(
    model_type: str, architecture: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    import transformers

    common = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    config = transformers.AutoConfig.for_model(model_type, **(common | settings))
    source = tmp_path / "own" / model_type
    getattr(transformers, architecture)(config).save_pretrained(source)
    inputs = example(whole(source))
    shards = cut(source, tmp_path / "shards", contiguous, 3, exact=True)
    with pytest.raises(InvalidInput, match=reason):
        chain([load_stage(shard) for shard in shards], inputs)


def _answer(shard: Path, step: bytes) -> tuple[str | None, bytes]:
    """In another process: run a stage; where to go next, and the handoff or the output."""
    from safetensors.torch import save

    result = load_stage(shard)(Handoff.from_bytes(step))
    if isinstance(result, Handoff):
        return result.next_module, result.to_bytes()
    return None, save({name: value.contiguous() for name, value in tensors(result).items()})


def test_stages_in_processes_of_their_own(tmp_path: Path) -> None:
    from safetensors.torch import load

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as here, ProcessPoolExecutor(1, mp_context=spawn) as there:
        for name in ("llama", "qwen2", "qwen3_moe", "gemma2", "gpt2", "bert", "mixtral", "mamba2", "t5"):
            first, second = cut(checkpoint(name), tmp_path / name, contiguous, 2)
            model = whole(checkpoint(name))
            inputs = example(model)
            following, step = here.submit(_answer, first, Handoff(inputs=inputs).to_bytes()).result()
            assert following is not None
            following, output = there.submit(_answer, second, step).result()
            assert following is None
            with torch.no_grad():
                assert_equal(load(output), model(**inputs))


def test_the_real_minilm_in_three_stages_gives_its_own_embeddings(tmp_path: Path) -> None:
    shards = cut(minilm(), tmp_path, contiguous, 3)
    stages = [load_stage(shard) for shard in shards]
    from transformers import AutoTokenizer

    # The first shard carries the tokenizer.
    inputs = dict(
        AutoTokenizer.from_pretrained(shards[0])(["A fair share.", "To each by what it can hold."], padding=True)
    )
    inputs = {name: torch.tensor(value) for name, value in inputs.items()}
    output, ran = chain(stages, inputs)
    assert ran == ["n0", "n1", "n2"]
    with torch.no_grad():
        assert_equal(output, whole(minilm())(**inputs))
    held = [sum(p.untyped_storage().nbytes() for p in stage.parameters()) for stage in stages]
    assert sum(held) < 91e6 + 3 * 10_000, "each weight is held once, and what is not held takes no memory"


@pytest.mark.parametrize("name", some(["llama", "t5", "bert"], shallow={"llama"}))
@pytest.mark.parametrize("parts", [1, 2, 6])
def test_one_stage_or_many(name: str, parts: int, tmp_path: Path) -> None:
    stages = [load_stage(shard) for shard in cut(checkpoint(name), tmp_path, contiguous, parts)]
    model = whole(checkpoint(name))
    inputs = example(model)
    output, ran = chain(stages, inputs)
    assert len(set(ran)) == parts
    with torch.no_grad():
        assert_equal(output, model(**inputs))


def test_any_shape_of_input_and_the_trace_is_made_once_a_shape(tmp_path: Path) -> None:
    stages = [load_stage(shard) for shard in cut(checkpoint("qwen2"), tmp_path, contiguous, 2)]
    model = whole(checkpoint("qwen2"))
    for batch, length in ((1, 1), (3, 17), (1, 1), (3, 17)):
        inputs = example(model, batch=batch, length=length)
        del inputs["attention_mask"]
        with torch.no_grad():
            assert_equal(chain(stages, inputs)[0], model(**inputs))
    assert len(stages[0]._flows) == 2


def test_embeddings_instead_of_ids(tmp_path: Path) -> None:
    stages = [load_stage(shard) for shard in cut(checkpoint("llama"), tmp_path, contiguous, 2)]
    model = whole(checkpoint("llama"))
    inputs = {"inputs_embeds": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        assert_equal(chain(stages, inputs)[0], model(**inputs))


def test_eager_attention_on_request(tmp_path: Path) -> None:
    shards = cut(checkpoint("llama"), tmp_path, contiguous, 2)
    stages = [load_stage(shard, attn_implementation="eager") for shard in shards]
    model = whole(checkpoint("llama"), attn_implementation="eager")
    inputs = example(model)
    with torch.no_grad():
        assert_equal(chain(stages, inputs)[0], model(**inputs))


def test_what_is_handed_on_is_what_is_needed(tmp_path: Path) -> None:
    stages = [load_stage(shard) for shard in cut(checkpoint("llama"), tmp_path, contiguous, 3)]
    step = stages[0](Handoff(inputs={"input_ids": torch.ones(2, 7, dtype=torch.long)}))
    assert step.next_module == "model.layers.1"
    assert {name: tuple(value.shape) for name, value in step.values.items()} == {"model.layers.0#0:0": (2, 7, 32)}


def test_t5_hands_the_encoders_output_past_the_first_decoder_layer(tmp_path: Path) -> None:
    stages = [load_stage(shard) for shard in cut(checkpoint("t5"), tmp_path, contiguous, 5)]
    inputs = {"input_ids": torch.full((1, 6), 5), "decoder_input_ids": torch.full((1, 3), 7)}
    step: Any = Handoff(inputs=inputs)
    seen = []
    for stage in stages:
        step = stage(step)
        if isinstance(step, Handoff):
            seen.append({name.partition("#")[0] for name in step.values})
    # The decoder's embedding runs with the encoder's, on the node that has the weights, and waits in the handoffs.
    assert "decoder.embed_tokens" in seen[0]
    assert "encoder.final_layer_norm" in seen[-1]


def test_a_handoff_survives_the_wire() -> None:
    base = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    step = Handoff(
        inputs={"input_ids": torch.tensor([[1, 2]])},
        values={"a": base, "b": base, "c": base.t(), "d": torch.zeros(()).expand(2, 2), "e": torch.empty(0, 3)},
        plan_id="p",
        revision="r",
        next_module="m",
    )
    back = Handoff.from_bytes(step.to_bytes())
    assert (back.plan_id, back.revision, back.next_module) == ("p", "r", "m")
    assert all(torch.equal(back.values[name], value) for name, value in step.values.items())
    assert torch.equal(back.inputs["input_ids"], step.inputs["input_ids"])
    # Kernels round differently where the order in memory is another.
    assert back.values["c"].stride() == base.t().stride() == (1, 4)
    assert len(step.to_bytes()) < len(Handoff(inputs={}, values={"a": base, "b": base.clone()}).to_bytes()) + 400


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 8, b"x" * 100, b"\x02" + b"\0" * 7 + b"{}", (99).to_bytes(8, "little")]
)
def test_what_is_no_handoff_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        Handoff.from_bytes(data)


def test_a_stage_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    first, second = (load_stage(shard) for shard in cut(checkpoint("llama"), tmp_path, contiguous, 2))
    start = Handoff(inputs={"input_ids": torch.ones(1, 3, dtype=torch.long)})
    with pytest.raises(Conflict, match=r"embed_tokens is next"):
        second(start)
    step = first(start)
    with pytest.raises(Conflict, match="nothing that can run now"):
        first(step)
    with pytest.raises(Conflict, match="plan other"):
        second(replace(step, plan_id="other"))
    with pytest.raises(InvalidInput, match="cannot be run in stages on these inputs"):
        first(Handoff(inputs={"nonsense": torch.ones(1)}))


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        load_stage(tmp_path)
    (shard,) = cut(checkpoint("llama"), tmp_path, contiguous, 1)
    config = json.loads((shard / "config.json").read_text())

    def with_config(**changes: object) -> None:
        (shard / "config.json").write_text(json.dumps(config | changes))

    with_config(model_type="nobody_knows_this")
    with pytest.raises(InvalidInput, match="nobody_knows_this"):
        load_stage(shard)
    with_config(quantization_config={"quant_method": "fp8"})
    with pytest.raises(InvalidInput, match="quantised"):
        load_stage(shard)
    with_config(hidden_size=64)
    with pytest.raises(InvalidCheckpoint, match="do not fit"):
        load_stage(shard)
    (shard / "config.json").unlink()
    with pytest.raises(NotFound, match=r"config\.json"):
        load_stage(shard)


def test_loading_leaves_torch_as_it_was(tmp_path: Path) -> None:
    before = torch.nn.Module.register_parameter
    (shard,) = cut(checkpoint("llama"), tmp_path, contiguous, 1)
    stage = load_stage(shard)
    assert torch.nn.Module.register_parameter is before
    assert not any("forward" in module.__dict__ for module in stage.modules())
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_the_example_runs_each_stage_in_its_own_process(tmp_path: Path) -> None:
    shards = cut(checkpoint("qwen3_moe"), tmp_path, contiguous, 2)
    script = Path(__file__).parents[3] / "examples" / "run_stages.py"
    parts = [script, *shards, "--text", "w5 w17 w3", "--check", checkpoint("qwen3_moe")]
    command = [sys.executable, *map(str, parts)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "logits: (1, 3, 160)" in ran.stdout
    assert "equal to the whole model, bit for bit" in ran.stdout


@pytest.mark.deep
def test_the_example_compares_with_a_model_that_keeps_no_cache_either(tmp_path: Path) -> None:
    """Jamba without an attention layer cannot make the cache that it asks for; its stages make none."""
    import transformers

    config = transformers.JambaConfig(
        vocab_size=160, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_state=8, mamba_dt_rank=4, num_experts=2, use_mamba_kernels=False,
    )  # fmt: skip
    source = tmp_path / "own" / "jamba"
    transformers.JambaForCausalLM(config).save_pretrained(source)
    shards = cut(source, tmp_path / "shards", contiguous, 2)
    script = Path(__file__).parents[3] / "examples" / "run_stages.py"
    command = [sys.executable, *map(str, (script, *shards, "--ids", "5,17,3", "--check", source))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "equal to the whole model, bit for bit" in ran.stdout


@pytest.mark.parametrize(
    ("model", "reason"),
    [("llava", "its code looks at tensors"), ("xlnet", "its code makes tensors on the CPU")],
)
def test_what_code_does_that_cannot_be_run_in_stages_is_said(model: str, reason: str, tmp_path: Path) -> None:
    import transformers

    source = tmp_path / "own" / model
    if model == "xlnet":
        made: Any = transformers.XLNetLMHeadModel(
            transformers.XLNetConfig(vocab_size=160, d_model=32, n_layer=2, n_head=4, d_inner=64)
        )
        inputs = {"input_ids": torch.tensor([[5, 7, 8]])}
    else:
        vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                  "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8, "patch_size": 4,
                  "projection_dim": 32}  # fmt: skip
        text = {"model_type": "llama", "vocab_size": 160, "hidden_size": 32, "intermediate_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
        made = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=150)
        )
        inputs = {"input_ids": torch.tensor([[5, 150, 150, 150, 150, 7]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    made.save_pretrained(source)
    shards = cut(source, tmp_path / "shards", contiguous, 2, exact=True)
    with pytest.raises(InvalidInput, match=reason):
        chain([load_stage(shard) for shard in shards], inputs)


_MEASURE = """
import sys
from workers.splitter import load_stage
def status(name):
    return int(next(l for l in open('/proc/self/status') if l.startswith(name)).split()[1]) * 1024
load_stage(sys.argv[1])  # a first one: imports and caches are paid
before = status('RssAnon')
stages = load_stage(sys.argv[2])
print(status('RssAnon') - before, sum(p.untyped_storage().nbytes() for p in stages.parameters()))
"""


def test_a_stage_takes_the_memory_of_its_own_weights(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "own" / "model")
    shards = cut(tmp_path / "own" / "model", tmp_path / "shards", contiguous, 4)
    small = cut(checkpoint("llama"), tmp_path / "small", contiguous, 1)
    ran = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(small[0]), str(shards[1])],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    grown, weights = (int(number) for number in ran.stdout.split())
    assert 100e6 < weights < 150e6, "two of six layers of 67 MB"
    assert grown < weights * 1.1 + 20e6
