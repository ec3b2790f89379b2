"""The test Hub speaks to the real client: what the client believes is what the Hub's documentation says."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import httpx2
import pytest
from hub.server import TestHub
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = bytes(range(256)) * 400
FILES: dict[str, bytes | str | Path] = {
    "config.json": '{"model_type": "none"}',
    "model.safetensors": WEIGHTS,
    "sub/deep er/vocab.txt": "a\nb\n",
}


@pytest.fixture
def api(hub: TestHub) -> HfApi:
    return HfApi(endpoint=hub.url)


def test_info_tree_and_files_reach_the_client(hub: TestHub, api: HfApi) -> None:
    hub.page_entries = 2
    sha = hub.add_repo("own/model", FILES)
    info = api.model_info("own/model", files_metadata=True)
    assert info.sha == sha
    assert info.siblings is not None
    sizes = {s.rfilename: (s.size, s.lfs.sha256 if s.lfs else None) for s in info.siblings}
    assert sizes["model.safetensors"] == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert sizes["config.json"] == (22, None)
    paths = [item.path for item in api.list_repo_tree("own/model", recursive=True)]
    assert sorted(paths) == ["config.json", "model.safetensors", "sub", "sub/deep er", "sub/deep er/vocab.txt"]
    assert hub.counters.requests("*/tree/*") == 3  # five entries, two a page
    folder = Path(snapshot_download("own/model"))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "sub/deep er/vocab.txt").read_text() == "a\nb\n"
    assert folder.name == sha


@pytest.mark.parametrize("relative", [False, True])
def test_lfs_comes_from_the_cdn_and_the_token_does_not_follow(hub: TestHub, api: HfApi, relative: bool) -> None:
    hub.relative_redirects = relative
    hub.add_repo("own/model", FILES, private=True)
    for name in ("config.json", "model.safetensors"):
        hf_hub_download("own/model", name, token=hub.token)
    assert hub.counters.body_bytes("*/model.safetensors", where="cdn") == len(WEIGHTS)
    assert all(r.authorization == f"Bearer {hub.token}" for r in hub.counters.log("*/resolve/*", where="hub"))
    assert hub.counters.requests(where="cdn") == 1
    assert not any(r.authorization for r in hub.counters.log(where="cdn"))


def test_history_is_kept_by_revision(hub: TestHub, api: HfApi) -> None:
    first = hub.add_repo("own/model", {"a.txt": "one"})
    second = hub.add_repo("own/model", {"a.txt": "two"})
    hub.tag("own/model", "v1", first)
    assert api.model_info("own/model").sha == second
    for revision, text in ((first, "one"), ("v1", "one"), (second, "two"), ("main", "two")):
        assert Path(api.hf_hub_download("own/model", "a.txt", revision=revision)).read_text() == text
    assert [c.commit_id for c in api.list_repo_commits("own/model")] == [second, first]


def test_refusals_are_the_errors_that_the_client_knows(hub: TestHub, api: HfApi) -> None:
    hub.add_repo("own/open", FILES)
    hub.add_repo("own/private", FILES, private=True)
    hub.add_repo("own/gated", FILES, gated=True)
    bob = hub.add_user("bob")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("own/missing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("own/open", revision="nope")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("own/open", "nope.json")
    for token in (False, bob):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("own/private", token=token)
        assert api.model_info("own/gated", token=token).gated == "manual"
        with pytest.raises(GatedRepoError):
            api.hf_hub_download("own/gated", "config.json", token=token)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info("own/open", token="hf_nonsense")
    hub.grant("own/private", "bob")
    hub.grant("own/gated", "bob")
    assert api.model_info("own/private", token=bob).private
    assert api.hf_hub_download("own/gated", "config.json", token=bob)


def test_commits_by_the_real_client(hub: TestHub) -> None:
    api = HfApi(endpoint=hub.url, token=hub.token)
    assert api.whoami()["name"] == "tester"
    assert api.create_repo("own/meta").repo_id == "own/meta"
    api.create_repo("own/meta", exist_ok=True)
    with pytest.raises(HfHubHTTPError):
        api.create_repo("own/meta")
    start = api.model_info("own/meta").sha

    def commit(text: str, parent: str | None = None) -> str:
        operations = [CommitOperationAdd("a/b.json", text.encode()), CommitOperationAdd("c.json", b"{}")]
        return api.create_commit("own/meta", operations, commit_message="m", parent_commit=parent).oid

    one = commit("one", start)
    assert hub.read("own/meta", "a/b.json") == b"one"
    assert commit("one") == one, "unchanged files make no commit"
    with pytest.raises(HfHubHTTPError) as conflict:
        commit("two", start)
    assert conflict.value.response.status_code == 412
    two = commit("two", one)
    assert hub.read("own/meta", "a/b.json", revision=one) == b"one"
    assert hub.read("own/meta", "a/b.json", revision=two) == b"two"
    api.upload_file(path_or_fileobj=b"x", path_in_repo="up.txt", repo_id="own/meta")
    api.delete_file("up.txt", "own/meta")
    assert not api.file_exists("own/meta", "up.txt")
    bob = hub.add_user("bob")
    with pytest.raises(HfHubHTTPError) as refused:
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="own/meta", token=bob)
    assert refused.value.response.status_code == 403


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own use of httpx2
def test_lfs_upload(hub: TestHub) -> None:
    hub.lfs_uploads = True
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("own/model")
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id="own/model")
    assert hub.read("own/model", "model.safetensors") == WEIGHTS
    assert hub.repo("own/model").resolve("main").entries["model.safetensors"].lfs  # type: ignore[union-attr]


def fetch(hub: TestHub, name: str = "model.safetensors", **headers: str) -> httpx2.Response:
    with httpx2.Client(follow_redirects=True, timeout=5) as client:
        return client.get(f"{hub.url}/own/model/resolve/main/{name}", headers=headers)


@pytest.mark.parametrize(
    ("header", "status", "expected"),
    [
        ("bytes=0-9", 206, WEIGHTS[:10]),
        ("bytes=100-", 206, WEIGHTS[100:]),
        ("bytes=-7", 206, WEIGHTS[-7:]),
        ("bytes=102399-999999", 206, WEIGHTS[-1:]),
        ("bytes=102400-", 416, b""),
        ("bytes=0-1,5-6", 200, WEIGHTS),
    ],
)
def test_ranges(hub: TestHub, header: str, status: int, expected: bytes) -> None:
    hub.add_repo("own/model", FILES)
    reply = fetch(hub, Range=header)
    assert (reply.status_code, reply.content) == (status, expected)


def test_faults_strike_where_and_as_often_as_told(hub: TestHub) -> None:
    hub.add_repo("own/model", FILES)
    fault = hub.fault("status", path="*/config.json", code=429, retry_after=7, times=2, skip=1)
    codes = [fetch(hub, "config.json").status_code for _ in range(5)]
    assert codes == [200, 429, 429, 200, 200]
    assert fault.hits == 2

    hub.fault("cut", where="cdn", after_bytes=1000)
    with pytest.raises(httpx2.RemoteProtocolError):
        fetch(hub)
    assert hub.counters.log(where="cdn")[-1].sent_bytes == 1000
    for after in (0, 1000):
        hub.fault("reset", where="cdn", after_bytes=after)
        with pytest.raises((httpx2.ReadError, httpx2.RemoteProtocolError)):
            fetch(hub)

    hub.fault("ignore_range", where="cdn")
    assert (reply := fetch(hub, Range="bytes=5-9")).status_code == 200
    assert reply.content == WEIGHTS
    hub.fault("wrong_range", where="cdn")
    assert fetch(hub, Range="bytes=5-9").headers["Content-Range"] == f"bytes 6-10/{len(WEIGHTS)}"
    hub.fault("etag", where="cdn")
    assert fetch(hub).headers["ETag"] == f'"{"0" * 40}"'
    hub.fault("flip", where="cdn", offset=300)
    assert [at for at, byte in enumerate(fetch(hub).content) if byte != WEIGHTS[at]] == [300]
    hub.fault("flip", where="cdn", offset=7)
    assert fetch(hub, Range="bytes=5-9").content == bytes([5, 6, 7 ^ 0xFF, 8, 9])

    hub.fault("trickle", where="cdn", bytes_per_s=500.0)
    before = time.monotonic()
    assert fetch(hub, Range="bytes=0-149").content == WEIGHTS[:150]
    assert time.monotonic() - before > 0.15  # a lower bound: no load can break it
    hub.fault("hang", path="*/config.json")
    with httpx2.Client(timeout=0.3) as client, pytest.raises(httpx2.ReadTimeout):
        client.get(f"{hub.url}/own/model/resolve/main/config.json")


def test_signed_urls_expire(hub: TestHub) -> None:
    hub.add_repo("own/model", FILES)
    with httpx2.Client() as client:
        url = client.head(f"{hub.url}/own/model/resolve/main/model.safetensors").headers["Location"]
        assert client.get(url).content == WEIGHTS
        hub.expire_urls()
        assert client.get(url).status_code == 403
        hub.sign_for_s = -1
        old = client.head(f"{hub.url}/own/model/resolve/main/model.safetensors").headers["Location"]
        assert client.get(old).status_code == 403
        assert client.get(old, headers={"Authorization": "Bearer x"}).status_code == 400
