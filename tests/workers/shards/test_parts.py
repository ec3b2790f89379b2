"""Parts of repositories, and models with modules behind them: cut into shards, proven, and put together again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cases import make as cases
from support.shard_cases import dealt
from transformers import AutoModel, BertConfig, BertModel

from planner.errors import Conflict
from workers.downloader import resolve
from workers.generator import generate
from workers.shards.manifest import read_manifest
from workers.splitter import load_stage, merge, split, verify

_BERT = BertConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=16,
)  # fmt: skip


def _embedder(folder: Path, *, inner: str = "", suffix: str = ".safetensors") -> Path:
    """A repository as sentence-transformers writes it: BERT, pooling, two Dense."""
    BertModel(_BERT).save_pretrained(folder / inner)
    (folder / inner / "tokenizer.json").write_text("{}")
    (folder / inner / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    modules = [(inner, "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Dense", "Dense")]
    entries = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "config_sentence_transformers.json").write_text("{}")
    for at, (path, _) in enumerate(modules[1:]):
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps({"in_features": 8, "out_features": 8, "at": at}))
    for path in ("2_Dense", "3_Dense"):
        state = {"linear.weight": torch.rand(8, 8), "linear.bias": torch.rand(8)}
        if suffix == ".bin":
            torch.save(state, folder / path / "pytorch_model.bin")
        else:
            save_file(state, folder / path / "model.safetensors")
    return folder


def _tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_modules_behind_a_model_travel_with_it_and_come_back(tmp_path: Path, inner: str) -> None:
    source = _embedder(tmp_path / "own" / "model", inner=inner)
    checkpoint = resolve(source)
    profile = generate(checkpoint, sequence_length=8, batch_size=2)
    *_, first, second = profile.layers
    assert [first.name, second.name] == ["2_Dense", "3_Dense"]
    assert (first.num_params, first.weight_bytes, first.layer_type) == (72, 288, "projector")
    # Behind the pooling, a sequence is one vector.
    assert first.compute_required == 2 * 2 * 64
    assert profile.at(batch_size=1, sequence_length=16).layers[-1].compute_required == 2 * 64
    assert profile.total_params == sum(p.numel() for p in BertModel(_BERT).parameters()) + 2 * 72
    plan = dealt(profile, ["a", "b", "c"])
    shards = [tmp_path / node for node in plan.allocation]
    for node, shard in zip(plan.allocation, shards, strict=True):
        split(checkpoint, profile, plan, node_id=node, output=shard)
        load_stage(shard)
    assert {"1_Pooling/config.json", "2_Dense/config.json"} <= {f.name for f in read_manifest(shards[-1]).extras}
    report = verify(shards, checkpoint=checkpoint)
    assert report.complete, report
    place = f"{inner}/" if inner else ""
    assert {f"{place}model.safetensors", "2_Dense/model.safetensors"} <= set(report.proven)
    merged = merge(shards, tmp_path / "merged")
    assert _tree(merged) == _tree(source)


def test_modules_in_old_files_come_back_as_safetensors(tmp_path: Path) -> None:
    source = _embedder(tmp_path / "own" / "model", suffix=".bin")
    checkpoint = resolve(source)
    profile = generate(checkpoint, compute=False)
    plan = dealt(profile, ["a", "b"])
    shards = [tmp_path / node for node in plan.allocation]
    for node, shard in zip(plan.allocation, shards, strict=True):
        split(checkpoint, profile, plan, node_id=node, output=shard)
    merged = merge(shards, tmp_path / "merged")
    for path in ("2_Dense", "3_Dense"):
        stored = torch.load(source / path / "pytorch_model.bin")
        back = load_file(merged / path / "model.safetensors")
        assert back.keys() == stored.keys()
        assert all(torch.equal(back[name], stored[name]) for name in stored)
    assert AutoModel.from_pretrained(merged)


def test_two_variants_are_two_models_to_everything_that_keeps_them(tmp_path: Path) -> None:
    source = tmp_path / "own" / "model"
    cases.make("layout-two-variants", source)
    whole = resolve(source, variant="bf16")
    profile = generate(whole, compute=False)
    other = generate(resolve(source, variant="fp16"), compute=False)
    assert profile.revision != other.revision
    plan = dealt(profile, ["a", "b"])
    with pytest.raises(Conflict, match="variant=fp16"):
        split(resolve(source, variant="fp16"), profile, plan, node_id="a", output=tmp_path / "no")
    shards = [tmp_path / node for node in plan.allocation]
    for node, shard in zip(plan.allocation, shards, strict=True):
        split(whole, profile, plan, node_id=node, output=shard)
    assert verify(shards, checkpoint=whole).complete
    assert not verify(shards, checkpoint=resolve(source, variant="fp16")).ok
    merged = merge(shards, tmp_path / "merged")
    assert (merged / "model.safetensors").read_bytes() == (source / "model.bf16.safetensors").read_bytes()
    shutil.rmtree(source)
