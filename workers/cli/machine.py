"""fairshard up, node, config, devices: this machine as a service or as a compute node."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from planner.errors import InvalidInput, NodeFailure
from workers.cli.arguments import adder, positive, size
from workers.cli.console import Table, emit, say, shown_bytes, shown_memory

_UP = """\
examples:
  fairshard up                        Redis, planner, three unequal nodes, API, page and Flower, until Ctrl-C
  fairshard up --nodes nodes.yaml --port 9000 --data /var/lib/fairshard
  fairshard up --coordinator --host 10.0.0.1    for nodes on other machines: docs/several-machines.md
"""
_NODE = """\
examples:
  NODE_ID=gpu-1 REDIS_URL=redis://10.0.0.1:6379/0 fairshard node
  fairshard node --node-id gpu-1 --redis redis://10.0.0.1:6379/0 --memory 20GiB
  fairshard node --node-id 'node-*'   takes the first of node-1, node-2, ... that is free in the data folder

The service accepts a node whose FAIRSHARD_JOIN_TOKEN was made with the service's FAIRSHARD_JOIN_KEY.
"""
_CONFIG = """\
examples:
  fairshard config                    every setting: its value here, and what it does
  fairshard config redis              those whose name or description has this word
  fairshard config --json

Secrets are not shown. The exit status is 2 if a setting is wrong: then nothing else starts.
"""
_DEVICES = """\
examples:
  fairshard devices                   all of them
  fairshard devices "RTX 4090"        one, and where its figures come from
"""
_COMPLETION = """\
examples:
  eval "$(fairshard completion bash)"             in ~/.bashrc (zsh: in ~/.zshrc, after compinit)
  fairshard completion fish > ~/.config/fish/completions/fairshard.fish
"""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands of this module."""
    add = adder(commands, common)

    command = add("up", up, "run the whole service on this machine, until Ctrl-C", _UP)
    command.add_argument("--port", type=int, default=8080, metavar="N", help="of API and page (default 8080)")
    command.add_argument(
        "--data", type=Path, metavar="DIR", help="data folder (default: FAIRSHARD_DATA or .fairshard)"
    )
    command.add_argument("--nodes", metavar="N|FILE", help="how many compute nodes, or a nodes file (default 3)")
    command.add_argument(
        "--coordinator", action="store_true", help="no nodes here: other machines join by the line that this prints"
    )
    command.add_argument("--host", metavar="ADDRESS", help="where a coordinator listens (default 127.0.0.1)")
    command.add_argument("--address", metavar="ADDRESS", help="where others find it, if not at --host")
    command.add_argument("--redis-port", type=int, metavar="N", help="of a coordinator's Redis (default 6379)")
    command.add_argument(
        "--insecure-redis", action="store_true", help="let other machines reach a Redis that speaks no TLS"
    )

    command = add("node", node, "run this machine as a compute node", _NODE)
    command.add_argument("--redis", metavar="URL", help="default: REDIS_URL")
    add_node_options(command)

    command = add("config", config, "show the settings in force here", _CONFIG)
    command.add_argument(
        "word", nargs="?", default="", metavar="WORD", help="only settings that have it in their text"
    )

    command = add("devices", devices, "list the devices whose figures are known", _DEVICES)
    command.add_argument("name", nargs="?", metavar="NAME", help="one of them, by any of its names")

    command = add("completion", completion, "print what makes the shell complete fairshard's commands", _COMPLETION)
    command.add_argument("shell", choices=("bash", "zsh", "fish"))


def needs(extras: str, *packages: str) -> None:
    """Refuse to start what would fail in its child processes.

    Raises:
        NodeFailure: If a package is missing.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise NodeFailure(
            f"this needs {', '.join(missing)}: pip install 'fairshard[{extras}]'",
            details={"packages": missing, "extra": extras},
        )


def add_node_options(command: argparse.ArgumentParser) -> None:
    """Add what every command that starts a node takes."""
    command.add_argument("--node-id", metavar="ID", help="default: NODE_ID or the host's name; * is a free number")
    command.add_argument("--data", type=Path, metavar="DIR", help="default: FAIRSHARD_DATA or .fairshard")
    command.add_argument("--flop-per-s", type=positive, metavar="N", help="instead of what is measured")
    command.add_argument("--memory", type=size, metavar="SIZE", help="for weights and KV cache, e.g. 20GiB")
    command.add_argument("--bandwidth", type=size, metavar="SIZE", help="of the memory in a second, e.g. 900GB")


def up(args: argparse.Namespace) -> int:
    """Fairshard up."""
    if args.coordinator:
        needs("queue,web", "celery", "flask", "psutil")
    else:
        needs("queue,web,workers", "celery", "flask", "psutil", "huggingface_hub")
    from workers.up.coordinator import Coordinator
    from workers.up.service import run

    given = {"host": args.host, "address": args.address, "redis_port": args.redis_port}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not args.coordinator:
        raise InvalidInput(f"--{next(iter(given)).replace('_', '-')} is a coordinator's: say --coordinator as well")
    if args.coordinator and args.nodes:
        raise InvalidInput("a coordinator runs no nodes: leave out --nodes, and run 'fairshard join' where they are")
    coordinator = Coordinator(insecure_redis=args.insecure_redis, **given) if args.coordinator else None
    return run(port=args.port, data=data_folder(args), nodes=args.nodes, coordinator=coordinator)


def data_folder(args: argparse.Namespace) -> Path:
    """--data, else what the environment says."""
    from workers.settings import Settings

    data: Path = args.data.expanduser().absolute() if args.data else Settings.from_env().data_dir
    return data


def node(args: argparse.Namespace) -> int:
    """Fairshard node."""
    return become_node(args, {"REDIS_URL": args.redis})


def become_node(args: argparse.Namespace, env: Mapping[str, str | None]) -> NoReturn:
    """Become the node's Celery worker, so that signals reach it, with these settings beside those of the options."""
    needs("queue,workers", "celery", "psutil", "huggingface_hub")
    from planner.names import check_node_id
    from workers.nodes.probe import hold_name, worker_argv
    from workers.settings import Settings, child_env

    node_id = args.node_id
    if node_id and "*" in node_id:
        node_id = hold_name(data_folder(args), node_id)
    changed = {
        **env,
        "NODE_ID": node_id and check_node_id(node_id),
        "FAIRSHARD_DATA": args.data and str(data_folder(args)),
        "FAIRSHARD_FLOP_PER_S": args.flop_per_s and repr(args.flop_per_s),
        "FAIRSHARD_MEMORY_BYTES": args.memory and str(args.memory),
        "FAIRSHARD_MEMORY_BYTES_PER_S": args.bandwidth and str(args.bandwidth),
        "REMAP_SIGTERM": "SIGQUIT",  # Celery's soft shutdown: what runs may finish
    }
    whole = child_env({name: value for name, value in changed.items() if value})
    settings = Settings.from_env(whole)
    argv = worker_argv(settings)
    say(args, f"node {settings.node_id} starts; Ctrl-C ends it")
    os.execve(argv[0], argv, whole)  # noqa: S606  (no shell is wanted)


def config(args: argparse.Namespace) -> int:
    """Fairshard config."""
    from workers.settings import settings_in_force

    rows, errors = settings_in_force()
    word = args.word.lower()
    rows = [row for row in rows if word in f"{row['name']} {row['what']}".lower()]
    cells = [
        (row["name"], row["value"], "wrong" if row["error"] else row["whence"], row["default"], row["what"])
        for row in rows
    ]
    head = ("setting", "value", "from", "default", "what it does")
    emit(args, {"settings": rows, "errors": [str(error) for error in errors]}, [Table(head, cells, whole=head[:1])])
    sys.stdout.flush()
    for error in errors:
        print(f"fairshard config: {error}", file=sys.stderr)
    return 2 if errors else 0


def devices(args: argparse.Namespace) -> int:
    """Fairshard devices."""
    from planner.devices import catalogue, lookup

    found = [lookup(args.name)] if args.name else list(catalogue())
    answer = [
        {
            "name": device.name,
            "flop_per_s": dict(device.flop_per_s),
            "memory_bytes": device.memory_bytes,
            "memory_bytes_per_s": device.memory_bytes_per_s,
            "source": device.source,
        }
        for device in found
    ]
    dtypes = ("fp32", "fp16", "bf16", "fp8", "int8")
    rows = [
        (
            device.name,
            *(f"{device.flop_per_s[dtype] / 1e12:.4g}" if dtype in device.flop_per_s else "" for dtype in dtypes),
            "" if device.memory_bytes is None else shown_memory(device.memory_bytes),
            "" if device.memory_bytes_per_s is None else f"{shown_bytes(device.memory_bytes_per_s)}/s",
        )
        for device in found
    ]
    head = ("device", *dtypes, "memory", "bandwidth")
    note = f"source: {found[0].source}" if args.name else "fairshard devices NAME shows where its figures come from."
    emit(args, {"devices": answer}, [Table(head, rows, right=head[1:]), "", f"fp32 to int8 in TFLOP/s; {note}"])
    return 0


def completion(args: argparse.Namespace) -> int:
    """Fairshard completion."""
    from argcomplete.shell_integration import shellcode

    code = shellcode(["fairshard"], True, args.shell)
    emit(args, {"shell": args.shell, "code": code}, [code])
    return 0
