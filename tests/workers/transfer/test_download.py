"""Names become checkpoints, and checkpoints folders: local first, then cache, then Hub; whole or not at all."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hub.server import TestHub
from support.checkpoints import checkpoint, models_dir

from planner.errors import (
    AccessDenied,
    Conflict,
    IntegrityError,
    InvalidCheckpoint,
    InvalidInput,
    NotFound,
    Unavailable,
)
from workers.checkpoint.folder import FolderCheckpoint
from workers.checkpoint.hub import HubCheckpoint, open_hub
from workers.disk.paths import is_inner
from workers.downloader import download, resolve
from workers.network.retry import RetryPolicy
from workers.progress import silent
from workers.settings import HubSettings
from workers.transfer.journal import STATE

FAST = RetryPolicy(first_s=0.01, longest_s=0.05, stall_s=0.5)
WEIGHTS = bytes(range(256)) * 20_000
FILES: dict[str, bytes | str | Path] = {
    "config.json": '{"model_type": "none"}',
    "model.safetensors": WEIGHTS,
    "sub/deep er/vocab.txt": "a\nb\n",
}


def test_a_folder_below_the_models_folder_wins_over_the_hub(hub: TestHub) -> None:
    hub.add_repo("tiny/llama", FILES)
    found = resolve("tiny/llama", models_dir=models_dir("llama"))
    assert isinstance(found, FolderCheckpoint)
    assert found.model_name == "tiny/llama"
    assert not hub.counters.requests()
    assert isinstance(resolve("tiny/llama"), HubCheckpoint)


def test_a_linked_model_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/model").symlink_to(checkpoint("llama"))
    found = resolve("own/model", models_dir=tmp_path)
    assert found.model_name == "own/model"
    assert found.read("config.json") == (checkpoint("llama") / "config.json").read_bytes()
    assert found.revision == resolve(checkpoint("llama")).revision


def test_a_folders_revision_follows_its_content_and_not_its_place(tmp_path: Path) -> None:
    one = Path(shutil.copytree(checkpoint("llama"), tmp_path / "one/model"))
    two = Path(shutil.copytree(checkpoint("llama"), tmp_path / "two/model"))
    revision = resolve(one).revision
    assert resolve(two).revision == revision
    (two / "README.md").write_text("words")
    assert resolve(two).revision == revision
    weights = two / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4096:] = bytes(4096)  # trained further: same header, other weights
    weights.write_bytes(data)
    assert resolve(two).revision != revision
    with pytest.raises(Conflict, match=revision):
        resolve(two, revision=revision)
    (one / "config.json").write_text("{}")
    assert resolve(one).revision != revision


@pytest.mark.parametrize(
    "source",
    ["", "a/b/c", "../../etc/passwd/x", "a" * 10_000, "/" + "a" * 10_000, "no-such-folder"],
    ids=lambda source: source[:12],
)
def test_what_names_nothing_is_refused(source: str) -> None:
    with pytest.raises((InvalidInput, NotFound)):
        resolve(source)


def test_the_hub_pins_the_commit_and_states_sizes_and_digests(hub: TestHub) -> None:
    first = hub.add_repo("own/model", FILES)
    hub.tag("own/model", "v1")
    second = hub.add_repo("own/model", {"config.json": "{}"})
    assert resolve("own/model").revision == second
    old = resolve("own/model", revision="v1")
    assert old.revision == first
    assert old.files["model.safetensors"].size_bytes == len(WEIGHTS)
    assert len(old.files["model.safetensors"].sha256 or "") == 64
    assert old.read("config.json") == b'{"model_type": "none"}'
    assert old.read("model.safetensors", 3, 1000) == WEIGHTS[3:1000]
    assert old.read("sub/deep er/vocab.txt") == b"a\nb\n"
    assert old.read("config.json", 5, 5) == b""
    with pytest.raises(InvalidCheckpoint, match="truncated, or a wrong header"):
        old.read("config.json", 0, 10**6)
    with pytest.raises(NotFound):
        old.read("nothing")


def test_gated_private_and_unknown_are_told_apart(hub: TestHub) -> None:
    hub.add_repo("own/gated", FILES, gated=True)
    hub.add_repo("own/private", FILES, private=True)
    with pytest.raises(AccessDenied, match="HF_TOKEN"):
        resolve("own/gated").read("model.safetensors", 0, 8)
    with pytest.raises(NotFound, match=r"private.*HF_TOKEN"):
        resolve("own/private")
    with pytest.raises(NotFound, match="own/none"):
        resolve("own/none")
    with pytest.raises(NotFound, match="no revision 'nope'"):
        resolve("own/gated", revision="nope", token=hub.token)
    other = hub.add_user("bob")
    with pytest.raises(AccessDenied, match="does not open it"):
        resolve("own/gated", token=other).read("model.safetensors", 0, 8)
    assert resolve("own/private", token=hub.token).read("model.safetensors", 0, 8) == WEIGHTS[:8]


def test_the_process_has_a_token_of_its_own(hub: TestHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("own/private", FILES, private=True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert resolve("own/private").read("model.safetensors", 0, 8) == WEIGHTS[:8]
    assert not [r for r in hub.counters.log(where="cdn") if r.authorization]


def test_a_listing_that_fails_is_tried_again(hub: TestHub) -> None:
    hub.add_repo("own/model", FILES)
    fault = hub.fault("status", path="*/api/models/*", code=503, times=3)
    open_hub("own/model", hub=HubSettings.from_env(), policy=FAST)
    assert fault.hits == 3
    hub.fault("status", path="*/api/models/*", code=503, times=None)
    with pytest.raises(Unavailable, match="tried 5 times"):
        open_hub("own/model", hub=HubSettings.from_env(), policy=FAST)


def test_offline_and_unreachable_use_the_cache(hub: TestHub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add_repo("own/model", FILES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotFound, match="HF_HUB_OFFLINE"):
        resolve("own/model")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    download(resolve("own/model"))
    hub.counters.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cached = resolve("own/model")
    assert (cached.model_name, cached.revision) == ("own/model", commit)
    assert cached.read("model.safetensors") == WEIGHTS
    assert not hub.counters.requests()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.fault("reset", times=None)
    unreachable = open_hub("own/model", hub=HubSettings.from_env(), policy=FAST)
    assert unreachable.revision == commit


def test_what_the_hubs_own_client_cached_is_not_fetched(hub: TestHub) -> None:
    from huggingface_hub import hf_hub_download

    hub.add_repo("own/model", FILES)
    path = Path(hf_hub_download("own/model", "model.safetensors", cache_dir=HubSettings.from_env().cache_dir))
    hub.counters.clear()
    found = resolve("own/model")
    assert found.local_path("model.safetensors") is not None
    assert found.read("model.safetensors") == WEIGHTS
    assert not hub.counters.requests("*safetensors*")
    # Another commit has the same blob.
    hub.add_repo("own/model", {"config.json": "{}"})
    assert resolve("own/model").local_path("model.safetensors") is not None
    # What the cache holds is a checkpoint by itself, of the name and commit in its path.
    folder = resolve(path.parent)
    assert folder.model_name == "own/model"


def test_our_download_is_the_hub_clients_cache(hub: TestHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    hub.add_repo("own/model", FILES)
    folder = download(resolve("own/model"))
    assert (
        Path(snapshot_download("own/model", local_files_only=True, cache_dir=HubSettings.from_env().cache_dir))
        == folder
    )


def test_a_download_is_resumed_checked_and_remembers_its_commit(hub: TestHub, tmp_path: Path) -> None:
    hub.add_repo("own/model", FILES | {"model.safetensors": WEIGHTS * 8})
    # Patient enough that what had begun before has come.
    source = open_hub("own/model", hub=HubSettings.from_env(), policy=replace(FAST, first_s=0.4, longest_s=0.4))
    cut = hub.fault("reset", path="*.safetensors", where="cdn", skip=9, times=None)
    with pytest.raises(Unavailable):
        download(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert cut.hits
    hub.faults.clear()
    brought = hub.counters.body_bytes("*.safetensors", where="cdn")
    assert brought > len(WEIGHTS)
    hub.counters.clear()
    assert download(source, tmp_path / "copy") == tmp_path / "copy"
    assert (tmp_path / "copy/model.safetensors").read_bytes() == WEIGHTS * 8
    assert (tmp_path / "copy/sub/deep er/vocab.txt").read_text() == "a\nb\n"
    assert hub.counters.body_bytes("*.safetensors", where="cdn") < len(WEIGHTS) * 7, "what had come is kept"
    folder = resolve(tmp_path / "copy")
    assert (folder.model_name, folder.revision) == ("own/model", source.revision)
    hub.counters.clear()
    download(source, tmp_path / "copy")
    assert not hub.counters.requests("*.safetensors")
    (tmp_path / "copy/config.json").write_text("{}")
    assert resolve(tmp_path / "copy").revision != source.revision


def test_a_large_file_with_a_wrong_byte_is_fetched_again(hub: TestHub, tmp_path: Path) -> None:
    hub.add_repo("own/model", FILES)
    fault = hub.fault("flip", path="*.safetensors", where="cdn", offset=len(WEIGHTS) - 100)
    download(resolve("own/model"), tmp_path / "copy")
    assert fault.hits == 1
    assert (tmp_path / "copy/model.safetensors").read_bytes() == WEIGHTS


def test_a_small_file_with_a_wrong_byte_is_read_again(hub: TestHub) -> None:
    hub.add_repo("own/model", FILES)
    source = open_hub("own/model", hub=HubSettings.from_env(), policy=FAST)
    fault = hub.fault("flip", path="*/config.json", offset=3)
    assert source.read("config.json") == b'{"model_type": "none"}'
    assert fault.hits == 1
    hub.fault("flip", path="*/config.json", offset=3, times=None)
    with pytest.raises(IntegrityError, match=r"config\.json"):
        source.read("config.json")


def test_progress_reaches_the_end_and_can_stop(hub: TestHub, tmp_path: Path) -> None:
    hub.add_repo("own/model", FILES)
    seen: list[tuple[int, int | None]] = []
    download(
        resolve("own/model"), tmp_path / "a", progress=lambda done, total, /, *, what="": seen.append((done, total))
    )
    assert seen[-1][0] == seen[-1][1] == sum(len(v) for v in FILES.values() if not isinstance(v, Path))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    def stop(_done: int, _total: int | None, /, *, what: str = "") -> None:
        raise KeyError(what)

    with pytest.raises(KeyError):
        download(resolve("own/model"), tmp_path / "b", progress=stop)
    assert not (tmp_path / "b").exists()
    download(resolve("own/model"), tmp_path / "b", progress=silent)
    assert os.listdir(tmp_path / "b")  # noqa: PTH208


def test_a_file_named_as_a_journal_might_be_comes_through(hub: TestHub, tmp_path: Path) -> None:
    hub.add_repo("own/model", FILES | {"state.jsonl": b"a line\n" * 100})
    download(resolve("own/model"), tmp_path / "copy")
    assert (tmp_path / "copy/state.jsonl").read_bytes() == b"a line\n" * 100
    assert not is_inner(STATE), "or a repository could have such a file"
