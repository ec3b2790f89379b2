"""The checkpoint factory: what it makes loads, and loads as what it says."""

from __future__ import annotations

import json

import pytest
import torch
from support.checkpoints import NAMES, checkpoint, minilm, models_dir
from transformers import AutoModel, AutoTokenizer


@pytest.mark.parametrize("name", NAMES)
def test_each_checkpoint_loads_with_nothing_missing(name: str) -> None:
    folder = checkpoint(name)
    assert folder == models_dir() / "tiny" / name
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size


def test_checkpoints_cover_one_file_and_several() -> None:
    assert len(list(checkpoint("llama").glob("*.safetensors"))) == 1
    assert len(list(checkpoint("llama_files").glob("*.safetensors"))) == 4
    assert (checkpoint("llama_files") / "model.safetensors.index.json").exists()


def test_the_real_minilm_is_there() -> None:
    model = AutoModel.from_pretrained(minilm())
    assert model.config.num_hidden_layers == 6
    with torch.no_grad():
        assert model(torch.tensor([[101, 7592, 102]])).last_hidden_state.shape == (1, 3, 384)
