"""Other nodes' shards as a source: they are asked before the Hub, and every failure falls back to the Hub."""

from __future__ import annotations

import http.client
import json
import logging
import urllib.parse
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from planner.errors import FairshardError
from workers.network.ranges import Server
from workers.network.retry import RetryPolicy
from workers.progress import stoppable
from workers.shards.manifest import Manifest
from workers.shards.origins import Peer

#: How long to wait for a node: not long, as the Hub has the same bytes.
PATIENCE = RetryPolicy(attempts=2, first_s=0.2, longest_s=1.0, connect_s=3.0, stall_s=10.0, longest_retry_after_s=5.0)
_LARGEST_BYTES = 200_000_000
_AT_ONCE = 16
#: What reading an answer raises if it is not a list of shards.
_MALFORMED = (LookupError, TypeError, ValueError, RecursionError)
_log = logging.getLogger(__name__)


def find_peers(
    urls: Iterable[str], *, token: str, model_name: str, revision: str, policy: RetryPolicy = PATIENCE
) -> tuple[Peer, ...]:
    """The shards of one revision that the nodes at `urls` serve; nodes that do not answer are left out.

    Args:
        urls: FAIRSHARD_PEER_URL of other nodes.
        token: FAIRSHARD_PEER_TOKEN.
        model_name: The model.
        revision: Its revision.
        policy: How long to wait for one of them.
    """
    places = list(urls)
    if not places:
        return ()
    with (
        stoppable("asks other nodes for their shards"),
        ThreadPoolExecutor(min(_AT_ONCE, len(places)), "peers") as pool,
    ):
        asked = pool.map(lambda url: _shards_at(url, token, (model_name, revision), policy), places)
        return tuple(peer for found in asked for peer in found)


def _shards_at(url: str, token: str, wanted: tuple[str, str], policy: RetryPolicy) -> list[Peer]:
    found = []
    server = Server(headers={"Authorization": f"Bearer {token}"}, policy=policy, redirects=False)
    try:
        for shard in _json(url, "/", server.headers, policy)["shards"]:
            if (shard["model_name"], shard["revision"]) == wanted:
                folder = f"/{urllib.parse.quote(str(shard['folder']), safe='')}"
                manifest = Manifest.from_json(
                    _json(url, f"{folder}/manifest.json", server.headers, policy), where=f"{url}{folder}"
                )
                found.append(Peer(server=server, url=f"{url.rstrip('/')}{folder}", manifest=manifest))
    except (OSError, http.client.HTTPException, FairshardError, *_MALFORMED) as error:
        _log.info("%s serves no shards now: %r", url, error)
    return found


def _json(url: str, path: str, headers: Mapping[str, str], policy: RetryPolicy) -> Any:
    parts = urllib.parse.urlsplit(url)
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = connect(parts.hostname or "", parts.port, timeout=policy.connect_s)
    try:
        connection.request("GET", parts.path.rstrip("/") + path, headers=dict(headers))
        response = connection.getresponse()
        body = response.read(_LARGEST_BYTES)
        if response.status != 200:
            raise ValueError(f"HTTP {response.status}")
        return json.loads(body)
    finally:
        connection.close()
