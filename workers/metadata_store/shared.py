"""The service's own store: metadata and plans in Redis, and on the disks of the roles that keep them.

Every role reads and writes through Redis, the one thing that all machines share. API and planner are keepers: each
has all of it in a folder as well, and gives it back to a Redis that was wiped or is new.

    store:seq           the last commit's id: Redis' time in µs, so that none comes twice, whatever Redis forgot
    store:file:<path>   commit -> the file's content from then on; "" if it was removed
    store:order         path -> commit of its newest content         store:removed   path -> commit that removed it
    store:whole         says that Redis has all that a keeper keeps; another value after each wipe
"""

from __future__ import annotations

import base64
import logging
import secrets
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from planner.errors import InvalidInput, NotFound, Unavailable
from planner.limits import MAX_JSON_BYTES
from workers.ledger.connection import reachable
from workers.metadata_store.base import check_path
from workers.metadata_store.folder import FolderStore

logger = logging.getLogger(__name__)

#: Files that a keeper handles at a time.
_AT_ONCE = 100
#: Older contents of one file that stay readable by their commits; what was removed, for a day.
_VERSIONS, _REMOVED_S = 4, 86400
#: Later than any commit.
_NEWEST_OF_ALL = "1e18"

_NEWEST = """
local function newest(key, limit)
  local found = nil
  for _, commit in ipairs(redis.call('HKEYS', key)) do
    if tonumber(commit) <= limit and (not found or tonumber(commit) > tonumber(found)) then found = commit end
  end
  return found and redis.call('HGET', key, found)
end
"""
_READ = f"""{_NEWEST}
return newest(KEYS[1], tonumber(ARGV[1]))
"""
# KEYS: seq, order, removed. ARGV: the files' prefix, "1" to leave alone what was ever known, then paths and contents.
_WRITE = f"""{_NEWEST}
local last, mine = redis.call('GET', KEYS[1]) or '0', nil
for i = 3, #ARGV, 2 do
  local path, content = ARGV[i], ARGV[i + 1]
  local key = ARGV[1] .. path
  local before = newest(key, {_NEWEST_OF_ALL}) or ''
  local known = before ~= '' or redis.call('ZSCORE', KEYS[3], path)
  if content ~= before and not (ARGV[2] == '1' and known) then
    if not mine then
      local time = redis.call('TIME')
      mine = string.format('%.0f', math.max(time[1] * 1000000 + time[2], tonumber(last) + 1))
      redis.call('SET', KEYS[1], mine)
    end
    redis.call('HSET', key, mine, content)
    local commits = redis.call('HKEYS', key)
    table.sort(commits, function(a, b) return tonumber(a) < tonumber(b) end)
    for old = 1, #commits - {_VERSIONS} do redis.call('HDEL', key, commits[old]) end
    local now_in, no_more_in = KEYS[2], KEYS[3]
    if content == '' then
      now_in, no_more_in = KEYS[3], KEYS[2]
      redis.call('EXPIRE', key, {_REMOVED_S})
    else
      redis.call('PERSIST', key)
    end
    redis.call('ZADD', now_in, mine, path)
    redis.call('ZREM', no_more_in, path)
  end
end
return mine or last
"""


def pack(content: bytes) -> str:
    """Bytes as text that Redis keeps: a plan or a profile takes a tenth of its size."""
    return base64.b85encode(zlib.compress(content, 6)).decode()


def unpack(packed: str, *, what: str) -> bytes:
    """What `pack` packed.

    Raises:
        InvalidInput: If it unpacks to more than any metadata takes; the message names it `what`.
    """
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(base64.b85decode(packed), MAX_JSON_BYTES)
    if unpacker.unconsumed_tail:
        raise InvalidInput(f"{what} unpacks to more than the {MAX_JSON_BYTES:,} bytes of any metadata")
    return content


class SharedStore:
    """The store of a service without METADATA_REPO; safe to use from threads."""

    #: As people are told; `open_store` opens folders and repositories only.
    spec = "redis"

    def __init__(self, redis: Redis, *, prefix: str = "fairshard:", folder: FolderStore | None = None) -> None:
        """Use `redis`; with a `folder`, be a keeper."""
        self._redis: Any = redis
        self._at = f"{prefix}store:"
        self._folder = folder
        self._read: Any = redis.register_script(_READ)
        self._write: Any = redis.register_script(_WRITE)
        #: `whole` and `seq` as of the last `keep`.
        self._kept: tuple[str | None, str | None] = (None, None)
        self._keeping = threading.RLock()

    def read(self, path: str, *, revision: str | None = None) -> bytes:
        """See `MetadataStore.read`.

        Raises:
            Unavailable: If Redis was wiped, and no keeper has given back yet what it had.
        """
        check_path(path)
        found = self._find(path, revision)
        if not found and self._folder is not None:
            self._give([path])
            found = self._find(path, revision)
        elif found is None:
            self._check_whole()
        if not found:
            at = f" at {revision}" if revision else ""
            raise NotFound(
                f"this service's store has no file {path}{at}", details={"path": path, "revision": revision}
            )
        return unpack(found, what=path)

    def write(self, files: Mapping[str, bytes | None], *, message: str) -> str:
        """See `MetadataStore.write`; a keeper has the files on its disk too when this returns.

        And what Redis was told before: the metadata that a plan was made from is kept no later than the plan.
        """
        for path in files:
            check_path(path)
        if self._folder is not None:
            self.keep()
            self._folder.write(files, message=message)
        return self._put(files)

    def list(self, prefix: str = "") -> list[str]:
        """See `MetadataStore.list`."""
        folder = f"{check_path(prefix.rstrip('/'))}/" if prefix.rstrip("/") else ""
        if self._folder is not None:
            self._give(self._folder.list(prefix))
        else:
            self._check_whole()
        with reachable():
            return sorted(p for p in self._redis.zrange(f"{self._at}order", 0, -1) if p.startswith(folder))

    def _check_whole(self) -> None:
        with reachable():
            whole = self._redis.get(f"{self._at}whole")
        if not whole:
            raise Unavailable(
                "this service's metadata and plans are not in Redis: it is new, or was wiped, and the API or the "
                "planner gives them back within seconds of its start"
            )

    def keep(self) -> None:
        """Have folder and Redis hold the same; a role that is no keeper has nothing to do.

        Called every few seconds: one round trip where nothing changed.

        Raises:
            NodeFailure: If the folder cannot be written.
            Unavailable: If Redis cannot be reached.
        """
        if self._folder is None:
            return
        with self._keeping:
            with reachable():
                whole, seq = self._redis.mget(f"{self._at}whole", f"{self._at}seq")
            if whole and (whole, seq) == self._kept:
                return
            same = whole is not None and whole == self._kept[0]
            if not same:
                whole = self._give_all(self._folder)
            self._take(self._folder, since=int(self._kept[1] or 0) if same else 0)
            self._kept = (whole, seq)

    # -- Redis -----------------------------------------------------------------------------------------------------
    def _find(self, path: str, revision: str | None) -> str | None:
        """The packed content; "" if the file was removed, None if nothing is known of it."""
        if revision is not None and not revision.isdecimal():
            return None
        with reachable():
            found: str | None = self._read(keys=[f"{self._at}file:{path}"], args=[revision or _NEWEST_OF_ALL])
        return found

    def _put(self, files: Mapping[str, bytes | None], *, unless_known: bool = False) -> str:
        words: list[str] = [f"{self._at}file:", "1" if unless_known else ""]
        for path, content in sorted(files.items()):
            words += [path, "" if content is None else pack(content)]
        with reachable():
            return str(self._write(keys=[f"{self._at}{name}" for name in ("seq", "order", "removed")], args=words))

    # -- a keeper's two directions ---------------------------------------------------------------------------------
    def _give_all(self, folder: FolderStore) -> str | None:
        """Give Redis what it does not know, and say that it is whole; None if it was wiped meanwhile."""
        mine = secrets.token_hex(8)
        begun = f"{self._at}whole:{mine}"
        with reachable():
            self._redis.set(begun, mine, ex=86400)
        count = self._give(folder.list())
        if count:
            logger.info("Redis was given back %d files of metadata and plans", count)
        with reachable():
            try:
                if not self._redis.persist(begun) or not self._redis.renamenx(begun, f"{self._at}whole"):
                    self._redis.delete(begun)
            except ResponseError:  # no such key: wiped between the two
                return None
            found: str | None = self._redis.get(f"{self._at}whole")
        return found

    def _give(self, paths: Iterable[str]) -> int:
        """Give Redis those of the folder's files that it never knew, or lost; how many were."""
        count = 0
        for some in _some(paths):
            with reachable():
                pipeline = self._redis.pipeline(transaction=False)
                for path in some:
                    pipeline.exists(f"{self._at}file:{path}")
                known = pipeline.execute()
            for path, there in zip(some, known, strict=True):
                content = None if there else self._on_disk(path)
                if content is not None:
                    self._put({path: content}, unless_known=True)
                    count += 1
        return count

    def _on_disk(self, path: str) -> bytes | None:
        assert self._folder is not None
        try:
            content = self._folder.read(path)
        except NotFound:
            return None
        except InvalidInput as error:
            logger.warning("left out of the store: %s", error)
            return None
        if len(content) > MAX_JSON_BYTES:
            logger.warning("left out of the store: %s takes %d bytes", path, len(content))
            return None
        return content

    def _take(self, folder: FolderStore, *, since: int) -> None:
        """Write into the folder what Redis was told after the commit `since`."""
        for name in ("order", "removed"):
            with reachable():
                changed = self._redis.zrangebyscore(f"{self._at}{name}", f"({since}", "inf")
            for some in _some(changed):
                with reachable():
                    pipeline = self._redis.pipeline(transaction=False)
                    for path in some:
                        self._read(keys=[f"{self._at}file:{path}"], args=[_NEWEST_OF_ALL], client=pipeline)
                    found = pipeline.execute()
                removed = name == "removed"
                files = {
                    path: None if removed else unpack(packed, what=path)
                    for path, packed in zip(some, found, strict=True)
                    # One that was evicted is no change; one that changed since comes with its other list.
                    if bool(packed) != removed
                }
                if files:
                    folder.write(files, message="As the service has it")


def _some(paths: Iterable[str]) -> Iterator[list[str]]:
    items = iter(paths)
    while some := list(islice(items, _AT_ONCE)):
        yield some
