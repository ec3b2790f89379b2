"""A Hub model is profiled from kilobytes: its config and headers by ranges, and the same numbers as from a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hub.server import TestHub
from safetensors.torch import load_file
from support import checkpoints

from workers.checkpoint.folder import open_folder
from workers.checkpoint.headers import read_headers
from workers.downloader import resolve
from workers.generator import generate

SLACK_BYTES = 64 * 1024


def sent(hub: TestHub, name: str) -> int:
    """Bytes of the file that the Hub sent."""
    return sum(request.sent_bytes for request in hub.counters.log() if request.path.endswith(f"/{name}"))


def many_files(folder: Path, count: int) -> Path:
    """A checkpoint of `count` files of 200 KB."""
    folder.mkdir()
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        entry = {"dtype": "U8", "shape": [200_000], "data_offsets": [0, 200_000]}
        raw = json.dumps({f"model.layers.{number}.a.weight": entry}).encode()
        (folder / name).write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(200_000))
        weight_map[f"model.layers.{number}.a.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["llama_files", "mixtral"])
def test_the_hubs_profile_is_the_folders_and_no_weights_are_fetched(name: str, hub: TestHub) -> None:
    folder = checkpoints.checkpoint(name)
    hub.add_repo(f"tiny/{name}", folder)
    checkpoint = resolve(f"tiny/{name}")
    mine, local = generate(checkpoint), generate(open_folder(folder))
    assert mine.layers == local.layers
    for file, header_bytes in read_headers(open_folder(folder)).header_bytes.items():
        assert 0 < sent(hub, file) <= header_bytes * 1.1 + SLACK_BYTES


def test_two_hundred_files_cost_their_headers(hub: TestHub, tmp_path: Path) -> None:
    folder = many_files(tmp_path / "many", 200)
    hub.add_repo("tiny/many", folder)
    profile = generate(resolve("tiny/many"), compute=False)
    assert profile.total_bytes == 200 * 200_000
    for path in folder.glob("*.safetensors"):
        header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert 0 < sent(hub, path.name) <= header_bytes * 1.1 + SLACK_BYTES


def test_a_bin_repository_is_profiled_without_its_weights(hub: TestHub, tmp_path: Path) -> None:
    source = checkpoints.checkpoint("llama_bf16")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    state = load_file(source / "model.safetensors")
    # Much data beside it, that nobody may fetch.
    torch.save({**state, "extra.weight": torch.zeros(500_000)}, folder / "pytorch_model.bin")
    hub.add_repo("tiny/bin", folder)
    mine, local = generate(resolve("tiny/bin")), generate(open_folder(folder))
    assert mine.layers == local.layers
    assert sent(hub, "pytorch_model.bin") < 2 * SLACK_BYTES + 16_000
