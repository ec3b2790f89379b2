"""What each role of a local service runs: the same commands as in Procfile and docker-compose.yml."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from planner.cluster import Node
from workers.nodes.joining import Authority
from workers.settings import child_env
from workers.up.supervisor import Role

#: Where everything listens; other machines need the compose file, with its passwords.
HOST = "127.0.0.1"
#: A process that never asks the Hub does not get these.
_HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
#: A log larger than this is set aside at the next start.
_LOG_BYTES = 10 * 2**20


@dataclass(frozen=True, slots=True)
class Roles:
    """Makes the roles of one service."""

    #: Folder of the roles' logs.
    logs: Path
    #: Environment that all but Redis share.
    common: Mapping[str, str]
    #: Makes the nodes' join tokens.
    authority: Authority = field(default_factory=Authority)

    def _role(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str], grace_s: float, without: Sequence[str] = ()
    ) -> Role:
        log = self.logs / f"{name}.log"
        with contextlib.suppress(OSError):
            if log.stat().st_size > _LOG_BYTES:
                log.replace(log.with_suffix(".log.1"))
        return Role(name=name, argv=argv, env=child_env(env, without=without), log=log, grace_s=grace_s)

    def redis(self, server: Sequence[str], config: Path, *, inherit: tuple[int, ...]) -> Role:
        """The private Redis; it inherits the data folder's lock."""
        role = self._role("redis", (*server, str(config)), env={}, grace_s=20, without=_HUB_TOKENS)
        return Role(name=role.name, argv=role.argv, env=role.env, log=role.log, grace_s=role.grace_s, inherit=inherit)

    def api(self, bind: str) -> Role:
        """The web process, listening on `host:port`."""
        argv = (sys.executable, "-m", "gunicorn", "-c", "python:web.gunicorn_conf", "--bind", bind)
        return self._role("api", (*argv, "--no-control-socket", "web.wsgi:app"), env=self.common, grace_s=20)

    def planner(self) -> Role:
        """The planner's worker, with the reconciler."""
        return self._worker("planner", "planner", {})

    def node(self, node: Node) -> Role:
        """A compute node that states the figures of `node`."""
        env = {
            "NODE_ID": node.node_id,
            "FAIRSHARD_FLOP_PER_S": repr(node.flop_per_s),
            "FAIRSHARD_MEMORY_BYTES": str(node.memory_bytes),
            "FAIRSHARD_JOIN_TOKEN": self.authority.token(node.node_id),
            # One address can't be that of all nodes here.
            "FAIRSHARD_PEER_URL": "",
            "FAIRSHARD_RUN_URL": "",
        }
        if node.memory_bytes_per_s is not None:
            env["FAIRSHARD_MEMORY_BYTES_PER_S"] = repr(node.memory_bytes_per_s)
        return self._worker(node.node_id, f"compute,node.{node.node_id}", env)

    def flower(self, port: int) -> Role:
        """Flower, where tasks can be watched."""
        # By default its list leaves out the arguments: job and step.
        columns = "--tasks_columns=name,args,state,result,received,runtime,worker,uuid"
        argv = (*_CELERY, "flower", f"--address={HOST}", f"--port={port}", columns)
        return self._role("flower", argv, env=self.common, grace_s=10, without=_HUB_TOKENS)

    def _worker(self, name: str, queues: str, env: Mapping[str, str]) -> Role:
        argv = (*_CELERY, "worker", "-Q", queues, "-n", f"{name}@%h", "-c", "1", "--loglevel", "INFO")
        # REMAP_SIGTERM: Celery's soft shutdown, which hands back what it can't finish in time.
        return self._role(name, argv, env={**self.common, **env, "REMAP_SIGTERM": "SIGQUIT"}, grace_s=45)


_CELERY = (sys.executable, "-m", "celery", "-A", "workers.celery_app")
