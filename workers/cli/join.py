"""fairshard join: this machine as a node of a coordinator on another one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from planner.errors import InvalidInput, Unavailable
from workers.cli.arguments import adder
from workers.cli.console import say
from workers.cli.machine import add_node_options, become_node, data_folder

#: Where a node serves its shards to the others, unless told otherwise.
PEER_PORT = 8081

_JOIN = """\
examples:
  fairshard join http://10.0.0.1:8080 fsi_...          the line that 'fairshard up --coordinator' printed
  fairshard join http://10.0.0.1:8080 - < token        the token from stdin: it stays out of the shell's history
  fairshard join                                       start again, as this machine joined before
  fairshard join --new [NODE]                          on the coordinator: another line, for that node alone
"""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command of this module."""
    command = adder(commands, common)("join", join, "make this machine a node of a coordinator", _JOIN)
    command.add_argument("url", nargs="?", metavar="URL", help="of the coordinator's API")
    command.add_argument("token", nargs="?", metavar="TOKEN", help="what it printed; - reads it from stdin")
    command.add_argument("--token-file", type=Path, metavar="FILE", help="a file that holds the token")
    command.add_argument(
        "--new",
        nargs="?",
        const="*",
        metavar="NODE",
        help="on the coordinator: print a line for another machine, for this node id alone if there is one",
    )
    command.add_argument(
        "--peer-port",
        type=int,
        default=PEER_PORT,
        metavar="N",
        help=f"where other nodes fetch this one's shards (default {PEER_PORT}; 0: nowhere)",
    )
    add_node_options(command)


def join(args: argparse.Namespace) -> int:
    """Fairshard join."""
    if args.new is not None:
        from workers.up.coordinator import invite

        print(invite(data_folder(args), args.new))
        return 0
    from workers.nodes.invitations import kept

    folder = data_folder(args) / "joined"
    if args.url:
        _accept(args, folder)
    invitation = kept(folder)
    own = _own_address(invitation.redis_url)
    env = invitation.environment(folder)
    _check_redis(env["REDIS_URL"])
    if args.peer_port:
        env["FAIRSHARD_PEER_URL"] = f"http://{f'[{own}]' if ':' in own else own}:{args.peer_port}"
    return become_node(args, env)


def _accept(args: argparse.Namespace, folder: Path) -> None:
    from workers.network.api_client import Client
    from workers.nodes.invitations import Invitation, invitation_id
    from workers.settings import ClientSettings

    token = _token(args)
    if not args.url.startswith(("http://", "https://")):
        raise InvalidInput(f"the coordinator's URL must start with http:// or https://, got {args.url!r:.80}")
    client = Client(ClientSettings.from_env({"FAIRSHARD_URL": args.url}), timeout_s=10)
    try:
        answer = client.call("GET", f"/api/nodes/invitations/{invitation_id(token)}")
    except Unavailable as error:
        raise Unavailable(
            f"{str(error).partition(';')[0]}: does the coordinator run, and is that port open to this machine?",
            details=error.details,
        ) from None
    Invitation.open(str(answer.get("sealed")), token).keep(folder)
    say(args, f"joined {args.url}; 'fairshard join' starts this node again")


def _token(args: argparse.Namespace) -> str:
    if args.token_file:
        return str(args.token_file.read_text(encoding="utf-8")).strip()
    if args.token == "-":  # noqa: S105  (no password)
        return sys.stdin.readline().strip()
    if not args.token:
        raise InvalidInput(
            "the token is missing: fairshard join URL TOKEN, as 'fairshard up --coordinator' printed it"
        )
    return str(args.token)


def _own_address(redis_url: str) -> str:
    """This machine's address on the way to the coordinator's Redis, at which the other nodes find it.

    Raises:
        Unavailable: If there is no way.
    """
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(redis_url)
    place = (parts.hostname or "", parts.port or 6379)
    try:
        with socket.create_connection(place, timeout=5) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise Unavailable(
            f"the coordinator's Redis can't be reached at port {place[1]} of {place[0]} ({error}): does it run, and "
            "is that port open to this machine?",
            details={"host": place[0], "port": place[1]},
        ) from None


def _check_redis(url: str) -> None:
    from workers.ledger.connection import connect, reachable

    with connect(url) as client, reachable():
        client.ping()
