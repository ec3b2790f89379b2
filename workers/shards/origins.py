"""Where a tensor's bytes can be got: this node's other shards, files on this machine, other nodes, the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from workers.checkpoint.base import Checkpoint
from workers.network.ranges import RemoteFile, Server
from workers.shards.folder import finished_shards
from workers.shards.manifest import Manifest, ShardTensor
from workers.transfer.segments import Origin, of_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A shard that another node serves."""

    server: Server
    #: Address of the shard's folder.
    url: str
    manifest: Manifest


class Origins:
    """The places that have the tensors of one shard that is to be made, best place first."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        beside: Path,
        peers: tuple[Peer, ...],
        known: Mapping[str, str],
        doubted: Path | None = None,
    ) -> None:
        """Look for `checkpoint`'s bytes.

        Args:
            checkpoint: Whose they are.
            beside: The folder of this node's shards.
            peers: Other nodes' shards.
            known: Digests that the caller knows.
            doubted: A shard here that was checked less than asked for now, so its digests are not used.
        """
        self._checkpoint = checkpoint
        self._beside = beside
        self._told = known
        self._doubted = doubted
        self._peers: dict[str, list[tuple[Peer, ShardTensor]]] = {}
        for peer in peers:
            if peer.manifest.revision == checkpoint.revision:
                for tensor in peer.manifest.tensors:
                    self._peers.setdefault(tensor.name, []).append((peer, tensor))

    def known(self) -> dict[str, str]:
        """Tensor -> digest that other nodes, this node's other shards, or the caller found for this revision."""
        theirs = {
            name: held.digest for name, found in self._peers.items() for _, held in reversed(found) if held.digest
        }
        mine = {
            name: held.digest
            for name, (path, held) in self._here.items()
            if held.digest and path.parent != self._doubted
        }
        return theirs | mine | dict(self._told)

    @cached_property
    def _here(self) -> dict[str, tuple[Path, ShardTensor]]:
        """Tensor -> where another shard of this node has it; read when it is asked for, and not for links alone."""
        found: dict[str, tuple[Path, ShardTensor]] = {}
        for folder, manifest in finished_shards(self._beside):
            if (manifest.model_name, manifest.revision) == (self._checkpoint.model_name, self._checkpoint.revision):
                for tensor in manifest.tensors:
                    if tensor.digest is not None:
                        found[tensor.name] = (folder / tensor.file, tensor)
        return found

    def of(self, tensor: str, file: str, offset: int) -> tuple[Origin, ...]:
        """Where bytes can be had that lie from `offset` of checkpoint file `file` on, and belong to `tensor`."""
        found: list[Origin] = []
        here = self._here.get(tensor)
        if here is not None and (here[1].source_file, here[1].source_begin) == (file, offset):
            found.append(Origin(file=here[0], offset=here[1].begin))
        own = of_checkpoint(self._checkpoint, file, offset)
        if own.server is None:
            return (*found, own)
        for peer, held in self._peers.get(tensor, ()):
            if (held.source_file, held.source_begin) == (file, offset):
                size = next(item.size_bytes for item in peer.manifest.files if item.name == held.file)
                remote = RemoteFile(url=f"{peer.url}/{held.file}", size_bytes=size)
                found.append(Origin(file=remote, offset=held.begin, server=peer.server))
        return (*found, own)
