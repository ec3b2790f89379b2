"""A shard is whole or not there: kill -9, full disks, quotas, cancelling, and what a second call finds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.shard_cases import dealt, plan_of, profile_of, raw_tensors

from planner.errors import Cancelled, Conflict, IntegrityError, NodeFailure
from planner.plan import Plan
from planner.profile import ModelProfile
from workers.checkpoint.base import Checkpoint
from workers.disk.space import used_bytes
from workers.downloader import download, resolve
from workers.shards.folder import finished_shards
from workers.shards.space import check_room
from workers.splitter import delete_shard, merge, split, verify
from workers.transfer.journal import STATE

MIB = 2**20
#: Splits own/model for node "a" of two in a process of its own; the arguments are the source and the output.
SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from support.shard_cases import dealt, profile_of
from workers.downloader import resolve
from workers.splitter import split
source = resolve(sys.argv[1])
profile = profile_of(source)
split(source, profile, dealt(profile, ["a", "b"]), node_id="a", output=Path(sys.argv[2]), link=False)
print("done")
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 32 MiB in 32 layers."""
    folder = tmp_path_factory.mktemp("own") / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_weights(folder / "model.safetensors")
    return folder


def write_weights(path: Path, *, seed: int = 0, name: str = "l") -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    save_file({f"{name}.{i:02d}.w": torch.randn(MIB // 4) for i in range(32)}, path, metadata={"format": "pt"})


def start(source: str, output: Path) -> subprocess.Popen[str]:
    code = SCRIPT.format(paths=[str(Path(__file__).parents[2])])
    return subprocess.Popen([sys.executable, "-c", code, source, str(output)], stdout=subprocess.PIPE, text=True)


def journal_lines(output: Path) -> int:
    return sum(
        len(path.read_bytes().splitlines()) - 1
        for folder in leftovers(output.parent)
        if (path := folder / STATE).exists()
    )


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(".*.partial-*"))


def prepared(source: Checkpoint, *nodes: str) -> tuple[ModelProfile, Plan]:
    profile = profile_of(source)
    return profile, dealt(profile, nodes or ["a", "b"])


def test_after_kill_9_only_what_is_missing_or_damaged_is_fetched(hub: TestHub, large: Path, tmp_path: Path) -> None:
    hub.add_repo("own/model", large)
    hub.bytes_per_s = 1.5e6
    output = tmp_path / "shard"
    process = start("own/model", output)
    deadline = time.monotonic() + 60
    while journal_lines(output) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "nothing was ever noted as done"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.bytes_per_s = None
    assert not output.exists()
    kept = journal_lines(output)
    (partial,) = leftovers(tmp_path)
    entry = json.loads((partial / STATE).read_bytes().splitlines()[1])
    with (partial / entry["f"]).open("rb+") as file:  # as a power cut may leave it
        file.seek(entry["b"] + 7)
        file.write(b"????")
    with (partial / STATE).open("ab") as file:
        file.write(b'{"f": "model.safe')  # torn
    source = resolve("own/model")
    profile, plan = prepared(source)
    hub.counters.clear()
    manifest = split(source, profile, plan, node_id="a", output=output)
    fetched = hub.counters.body_bytes("*.safetensors", where="cdn")
    assert fetched <= manifest.tensor_bytes - (kept - 1) * MIB + 100_000
    everything = raw_tensors(large)
    assert raw_tensors(output) == {t.name: everything[t.name] for t in manifest.tensors}
    assert not leftovers(tmp_path)
    assert verify(output).ok


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_all_is_on_the_disk_before_the_shard_has_its_name(
    hub: TestHub, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    hub.add_repo("own/model", large)
    source = resolve(large) if where == "folder" else resolve("own/model")
    profile, plan = prepared(source)
    done: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink()))

    def renamed(path: Path, target: Path) -> Path:
        done.append(("rename", path))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    split(source, profile, plan, node_id="a", output=tmp_path / "a")
    ((at, partial),) = [(at, path) for at, (what, path) in enumerate(done) if what == "rename"]
    shard = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*")} | {Path()}
    before = {path.relative_to(partial) for _, path in done[:at] if path.is_relative_to(partial)}
    assert before == shard
    assert ("fsync", tmp_path) in done[at:], "or the name itself could be lost"


def test_a_local_copy_killed_at_any_moment_is_whole_or_not_there(large: Path, tmp_path: Path) -> None:
    output = tmp_path / "shard"
    for reached in ("", "model.safetensors", "model.safetensors.index.json"):
        process = start(str(large), output)
        while process.poll() is None and not list(tmp_path.glob(f".shard.partial-*/{reached}")):
            time.sleep(0.0005)
        process.kill()
        process.communicate()
        assert not output.exists() or verify(output).ok
    process = start(str(large), output)
    assert process.communicate()[0] == "done\n"
    assert verify(output, checkpoint=resolve(large)).ok
    assert not leftovers(tmp_path)


def test_two_at_once_make_one_shard(large: Path, tmp_path: Path) -> None:
    output = tmp_path / "shard"
    processes = [start(str(large), output) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["done\n"] * 3
    assert verify(output, checkpoint=resolve(large)).ok
    assert not leftovers(tmp_path)


def test_cancelling_leaves_nothing_that_looks_finished_and_resumes(large: Path, hub: TestHub, tmp_path: Path) -> None:
    hub.add_repo("own/model", large)
    source = resolve("own/model")
    profile, plan = prepared(source)
    hub.bytes_per_s = 2e6

    def cancel(done: int, _total: int | None, /, *, what: str = "") -> None:
        if done > 2 * MIB:
            raise Cancelled

    with pytest.raises(Cancelled):
        split(source, profile, plan, node_id="a", output=tmp_path / "a", progress=cancel)
    assert not (tmp_path / "a").exists()
    hub.bytes_per_s = None
    hub.counters.clear()
    manifest = split(source, profile, plan, node_id="a", output=tmp_path / "a")
    assert hub.counters.body_bytes("*.safetensors", where="cdn") < manifest.tensor_bytes
    assert verify(tmp_path / "a").ok
    assert not leftovers(tmp_path)


def test_a_resumed_shard_never_writes_into_the_checkpoint(tmp_path: Path) -> None:
    """What was to be linked is to be copied now: the link that lies there is the checkpoint itself."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("one", "two"):
        write_weights(folder / f"{name}.safetensors", name=name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    source = resolve(folder)
    profile = profile_of(source)
    names = [layer.name for layer in profile.layers]
    plan = plan_of(profile, {"a": names[:-1], "b": names[-1:]})

    def cancel(done: int, _total: int | None, /, *, what: str = "") -> None:
        if done:
            raise Cancelled

    with pytest.raises(Cancelled):
        split(source, profile, plan, node_id="a", output=tmp_path / "a", progress=cancel)
    assert any(path.stat().st_nlink > 1 for path in tmp_path.glob(".a.partial-*/*.safetensors"))
    manifest = split(source, profile, plan, node_id="a", output=tmp_path / "a", link=False)
    assert {file.how for file in manifest.files} == {"copy"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not verify(tmp_path / "a", checkpoint=source).problems


def test_nothing_is_resumed_from_another_commit_or_unchecked(hub: TestHub, large: Path, tmp_path: Path) -> None:
    hub.add_repo("own/moving", large)
    source = resolve("own/moving")
    profile, plan = prepared(source)
    # As metadata in the williw form makes it.
    profile, plan = replace(profile, revision=None), replace(plan, revision=None)

    def cancel(done: int, _total: int | None, /, *, what: str = "") -> None:
        if done > 2 * MIB:
            raise Cancelled

    def fetched(moved: Path | None = None, **settings: Any) -> int:
        hub.bytes_per_s = 2e6
        with pytest.raises(Cancelled):
            split(source, profile, plan, node_id="a", output=tmp_path / "a", progress=cancel)
        if moved:
            hub.add_repo("own/moving", moved)
        hub.bytes_per_s = None
        hub.counters.clear()
        manifest = split(resolve("own/moving"), profile, plan, node_id="a", output=tmp_path / "a", **settings)
        sent = hub.counters.body_bytes("*.safetensors", where="cdn")
        assert verify(tmp_path / "a", checkpoint=resolve("own/moving")).ok
        shutil.rmtree(tmp_path / "a")
        return round(sent / manifest.tensor_bytes)

    assert fetched(paranoid=True) == 2
    moved = shutil.copytree(large, tmp_path / "moved")
    write_weights(moved / "model.safetensors", seed=1)
    assert fetched(moved) == 1


def test_a_whole_shard_is_kept_and_a_damaged_one_made_again(large: Path, tmp_path: Path) -> None:
    source = resolve(large)
    profile, plan = prepared(source)
    first = split(source, profile, plan, node_id="a", output=tmp_path / "a")
    inode = (tmp_path / "a/manifest.json").stat().st_ino
    assert split(source, profile, plan, node_id="a", output=tmp_path / "a") == first
    assert (tmp_path / "a/manifest.json").stat().st_ino == inode
    # Copied elsewhere and back: other times, the same bytes.
    os.utime(tmp_path / "a/model.safetensors", (1, 1))
    split(source, profile, plan, node_id="a", output=tmp_path / "a")
    assert (tmp_path / "a/manifest.json").stat().st_ino == inode
    with (tmp_path / "a/model.safetensors").open("rb+") as file:
        file.seek(100_000)
        file.write(b"?")
    assert not verify(tmp_path / "a").ok
    split(source, profile, plan, node_id="a", output=tmp_path / "a")
    assert verify(tmp_path / "a", checkpoint=source).ok
    other = dealt(profile, ["a", "b", "c"], plan_id="other")
    assert split(source, profile, other, node_id="a", output=tmp_path / "a").plan_id == "other"
    assert verify(tmp_path / "a", checkpoint=source).ok


def test_something_else_is_never_overwritten_or_deleted(large: Path, tmp_path: Path) -> None:
    source = resolve(large)
    profile, plan = prepared(source)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(Conflict, match="no shard"):
        split(source, profile, plan, node_id="a", output=tmp_path / "home")
    with pytest.raises(Conflict, match="nothing was deleted"):
        delete_shard(tmp_path / "home")
    assert (tmp_path / "home/letter.txt").read_text() == "dear"
    (tmp_path / "file").write_text("x")
    with pytest.raises((Conflict, NodeFailure)):
        split(source, profile, plan, node_id="a", output=tmp_path / "file")
    with pytest.raises(NodeFailure):
        split(source, profile, plan, node_id="a", output=tmp_path / "file" / "below")


def test_deleting_removes_the_shard_and_what_was_never_finished(large: Path, tmp_path: Path) -> None:
    source = resolve(large)
    profile, plan = prepared(source)
    split(source, profile, plan, node_id="a", output=tmp_path / "plan", link=False)
    (tmp_path / ".plan.partial-dead").mkdir()
    (tmp_path / ".plan.partial-dead/model.safetensors").write_bytes(b"x" * 1000)
    assert [folder.name for folder, _ in finished_shards(tmp_path)] == ["plan"]
    assert delete_shard(tmp_path / "plan") >= 16 * MIB
    assert not list(tmp_path.iterdir())
    assert delete_shard(tmp_path / "plan") == 0


def test_a_quota_is_kept_before_the_first_byte(large: Path, tmp_path: Path) -> None:
    source = resolve(large)
    profile, plan = prepared(source)
    split(source, profile, plan, node_id="a", output=tmp_path / "one", quota_bytes=24 * MIB)
    with pytest.raises(NodeFailure, match="FAIRSHARD_DISK_QUOTA") as caught:
        split(source, profile, plan, node_id="b", output=tmp_path / "two", quota_bytes=24 * MIB)
    assert caught.value.details["quota_bytes"] == 24 * MIB
    assert used_bytes(tmp_path) < 17 * MIB
    delete_shard(tmp_path / "one")
    split(source, profile, plan, node_id="b", output=tmp_path / "two", quota_bytes=24 * MIB)


def test_a_shard_that_will_not_fit_is_refused_before_the_first_byte(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(large)
    profile, plan = prepared(source)
    real = os.statvfs

    def nearly_full(path: Path) -> os.statvfs_result:
        values = list(real(path))
        values[4] = 10 * MIB // values[1]  # f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    with pytest.raises(NodeFailure, match="too few"):
        split(source, profile, plan, node_id="a", output=tmp_path / "a")
    assert used_bytes(tmp_path) < MIB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 24 MiB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("a full disk is made with mount, which is not here")
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(place)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a full disk is made by mounting a small one, and here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_disk_that_fills_up_meanwhile_is_named(hub: TestHub, large: Path, small_disk: Path, where: str) -> None:
    hub.add_repo("own/model", large)
    source = resolve(large) if where == "folder" else resolve("own/model")
    profile, plan = prepared(source)
    ballast = small_disk / "ballast"

    def fill(done: int, _total: int | None, /, *, what: str = "") -> None:
        if not ballast.exists():
            ballast.write_bytes(b"x" * (12 * MIB))

    # 16 MiB are needed and 24 are there when it is checked; then someone else writes 12.
    def checked(*args: Any, **settings: Any) -> None:
        check_room(*args, **settings)
        fill(0, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.splitter.check_room", checked)
        with pytest.raises(NodeFailure, match=r"the disk is full \("):
            split(source, profile, plan, node_id="a", output=small_disk / "a")
    assert not (small_disk / "a").exists()
    ballast.unlink()
    split(source, profile, plan, node_id="a", output=small_disk / "a")
    assert verify(small_disk / "a").ok


def test_a_disk_that_is_read_only_is_named(large: Path, small_disk: Path) -> None:
    source = resolve(large)
    profile, plan = prepared(source)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(NodeFailure, match=r"(?i)read-only"):
        split(source, profile, plan, node_id="a", output=small_disk / "a")


def test_a_file_size_limit_is_named(tmp_path: Path, large: Path) -> None:
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({4 * MIB}, {4 * MIB}))\n"
    ) + SCRIPT.format(paths=[str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code, str(large), str(tmp_path / "a")],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode
    assert "the process's limit" in done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_more_files_than_a_process_may_open_are_no_matter(hub: TestHub, tmp_path: Path, where: str) -> None:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "own/many"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({f"l.{i:03}.w": torch.full((3,), i) for i in range(800)}, folder / "model.safetensors")
    hub.add_repo("own/many", folder)
    script = SCRIPT.replace("link=False", "link=False, max_shard_bytes=1")
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n" + script.format(
        paths=[str(Path(__file__).parents[2])]
    )
    source = str(folder) if where == "folder" else "own/many"
    done = subprocess.run(
        [sys.executable, "-c", code, source, str(tmp_path / "a")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = verify(tmp_path / "a", checkpoint=resolve(folder) if where == "folder" else None)
    assert report.ok
    assert report.files == 400


def test_a_whole_file_is_linked_and_digested_by_verify(tmp_path: Path) -> None:
    source = resolve(checkpoint("llama"))
    profile = profile_of(source)
    manifest = split(source, profile, dealt(profile, ["a"]), node_id="a", output=tmp_path / "a")
    assert manifest.files[0].how in {"link", "reflink", "copy"}
    if manifest.files[0].how == "copy":
        pytest.skip("the temporary folder lies on another filesystem than the checkpoint")
    assert manifest.files[0].digest is None
    assert verify(tmp_path / "a", checkpoint=source).complete
    digested = split(source, profile, dealt(profile, ["a"]), node_id="a", output=tmp_path / "a")
    assert digested.files[0].digest
    assert all(t.digest for t in digested.tensors)
    copied = split(source, profile, dealt(profile, ["a"]), node_id="a", output=tmp_path / "b", link=False)
    assert copied.files[0].digest == digested.files[0].digest
    assert {t.name: t.digest for t in copied.tensors} == {t.name: t.digest for t in digested.tensors}


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("tensors", 0, "end"), 10**18),
        (("tensors", 0, "begin"), None),
        (("tensors", 0, "file"), "other.safetensors"),
        (("files", 0, "size_bytes"), "many"),
        (("files", 0, "digest"), []),
        (("files", 0, "sha256"), 7),
        (("tensors", 0, "file"), "config.json"),
        (("tensors", 0, "name"), ["a"]),
        (("tensors", 0, "source_begin"), "8"),
        (("tensors", 0, "shape"), [1.5]),
        (("source_files", "model.safetensors", "header_bytes"), -1),
        (("source_files", "model.safetensors", "size_bytes"), float("inf")),
        (("aliases", "x"), []),
        (("twins",), ["x"]),
        (("max_shard_bytes",), float("inf")),
        (("nodes", "a"), 7),
        (("layers",), [[]]),
    ],
)
def test_a_manifest_with_impossible_figures_is_refused(
    tmp_path: Path, where: tuple[str | int, ...], value: object
) -> None:
    source = resolve(checkpoint("llama"))
    profile = profile_of(source)
    split(source, profile, dealt(profile, ["a"]), node_id="a", output=tmp_path / "a")
    manifest = json.loads((tmp_path / "a/manifest.json").read_bytes())
    *parts, name = where
    holder = manifest
    for part in parts:
        holder = holder[part]
    holder[name] = value
    (tmp_path / "a/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="not a valid manifest"):
        verify(tmp_path / "a")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema_version": 1, "plan_id": ' * 50_000, "\xff", ""])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(IntegrityError):
        verify(tmp_path)
    assert not list(finished_shards(tmp_path.parent))


def test_lines_of_a_journal_that_say_nothing_are_passed_over(large: Path, tmp_path: Path) -> None:
    source = resolve(large)
    profile, plan = prepared(source)

    def cancel(done: int, _total: int | None, /, *, what: str = "") -> None:
        if done:
            raise Cancelled

    with pytest.raises(Cancelled):
        split(source, profile, plan, node_id="a", output=tmp_path / "a", link=False, progress=cancel)
    (partial,) = leftovers(tmp_path)
    with (partial / STATE).open("ab") as file:
        for line in ('{"f": "x", "b": Infinity, "e": 1, "d": ""}', "[" * 100_000, "[]", "7", '{"f": []}', "\0"):
            file.write(line.encode() + b"\n")
    split(source, profile, plan, node_id="a", output=tmp_path / "a", link=False)
    assert verify(tmp_path / "a").ok


def test_a_planted_link_is_neither_taken_over_nor_emptied(hub: TestHub, large: Path, tmp_path: Path) -> None:
    """In a folder that others write to as well."""
    hub.add_repo("own/model", large)
    precious = tmp_path / "precious"
    (precious / "below").mkdir(parents=True)
    (precious / "letter.txt").write_text("dear")
    place = tmp_path / "place"
    place.mkdir()
    for name in ("shard", "model", "whole"):
        (place / f".{name}.partial-0000").symlink_to(precious)
    source = resolve(large)
    profile = profile_of(source)
    split(source, profile, dealt(profile, ["a"]), node_id="a", output=place / "shard", link=False)
    merge(place / "shard", place / "whole")
    download(resolve("own/model"), place / "model")
    delete_shard(place / "shard")
    assert sorted(path.name for path in precious.iterdir()) == ["below", "letter.txt"]


def test_a_shard_that_is_being_deleted_is_not_taken_over(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing takes a while; the same plan is asked for again meanwhile."""
    source = resolve(large)
    profile, plan = prepared(source)
    split(source, profile, plan, node_id="a", output=tmp_path / "a", link=False)
    removing, rmtree = threading.Event(), shutil.rmtree

    def slow(path: Any, **settings: Any) -> None:
        if not removing.is_set():
            removing.set()
            time.sleep(0.5)
        rmtree(path, **settings)

    monkeypatch.setattr(shutil, "rmtree", slow)
    with ThreadPoolExecutor() as pool:
        gone = pool.submit(delete_shard, tmp_path / "a")
        assert removing.wait(10)
        made = pool.submit(split, source, profile, plan, node_id="a", output=tmp_path / "a", link=False)
        assert gone.result() > 16 * MIB
        made.result()
    assert verify(tmp_path / "a").ok
    assert not leftovers(tmp_path)


def test_a_disk_that_may_not_be_written_to_is_still_read(hub: TestHub, large: Path, small_disk: Path) -> None:
    hub.add_repo("own/model", large)
    source = resolve(large)
    profile, plan = prepared(source)
    held = split(source, profile, plan, node_id="a", output=small_disk / "a", digests=False, link=False)
    (small_disk / ".a.partial-old").mkdir()
    names = [name for name in source.files if not name.endswith(".safetensors")]
    download(resolve("own/model"), small_disk / "model", names=names)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert split(source, profile, plan, node_id="a", output=small_disk / "a") == held
    assert verify(small_disk / "a", checkpoint=source).ok
    assert download(resolve("own/model"), small_disk / "model", names=names) == small_disk / "model"
