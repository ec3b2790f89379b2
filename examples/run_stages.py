"""Run a model whose shards lie in several folders: one process a shard, each with only its own weights.

    python examples/run_stages.py SHARD... --text "a question" [--check CHECKPOINT]

Each process loads its stage and waits. This one sends the inputs to the stage that holds the first layer, passes each
handoff on to the stage that holds what is next, and prints what the last one gives. With `--check` it loads the whole
checkpoint as well, in a process of its own, and compares every number. Between machines the pipes would be sockets;
what goes through them is `Handoff.to_bytes()`, which is safetensors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from workers.runtime.payload import Handoff


def serve(shard: Path) -> None:
    """Load a stage; say what it holds; answer handoffs until there are no more."""
    from workers.splitter import load_stage

    stage = load_stage(shard)
    _send(sys.stdout.buffer, json.dumps({"node": stage.manifest.node_id, "held": sorted(stage.held)}).encode())
    while message := _receive(sys.stdin.buffer):
        result = stage(Handoff.from_bytes(message))
        if isinstance(result, Handoff):
            _send(sys.stdout.buffer, b"handoff " + result.to_bytes())
        else:
            _send(sys.stdout.buffer, b"output  " + save(_tensors(result)))


def whole(checkpoint: Path) -> None:
    """Answer the inputs of a handoff with the output of the undivided model."""
    import transformers

    from workers.runtime.weights import switch_caches_off

    architecture = json.loads((checkpoint / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(checkpoint).eval()
    switch_caches_off(model)  # stages keep none either, and some models cannot make theirs
    with torch.no_grad():
        output = model(**Handoff.from_bytes(_receive(sys.stdin.buffer)).inputs)
    _send(sys.stdout.buffer, save(_tensors(output)))


def run(shards: Sequence[Path], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's output for `inputs`, by one process for each shard."""
    stages = [_start("--serve", shard) for shard in shards]
    try:
        about = [json.loads(_receive(stage.stdout)) for stage in stages]
        message, following = Handoff(inputs=inputs).to_bytes(), None
        for step in range(1, 10_000):
            at = next((n for n, a in enumerate(about) if following is None or following in a["held"]), None)
            if at is None:
                raise SystemExit(f"none of these shards holds {following}")
            _send(stages[at].stdin, message)
            answer = _receive(stages[at].stdout)
            if not answer:
                raise SystemExit(f"the stage of {about[at]['node']} failed; see above")
            kind, message = answer[:8], answer[8:]
            print(f"step {step}: {about[at]['node']:<16} {len(message):>12,} bytes out", file=sys.stderr)
            if kind == b"output  ":
                return load(message)
            following = Handoff.from_bytes(message).next_module
        raise SystemExit("the chain does not end")
    finally:
        for stage in stages:
            assert stage.stdin is not None
            stage.stdin.close()
            stage.wait()


def main() -> None:
    """The command line; see the module's own text."""
    parser = argparse.ArgumentParser(description="Run a model from its shards, one process each.")
    parser.add_argument("shards", nargs="*", type=Path, help="finished shard folders; the first layer's first")
    parser.add_argument("--text", help="input, by the tokenizer that the first shard holds")
    parser.add_argument("--ids", help="input as token ids: 5,17,3")
    parser.add_argument("--decoder-ids", help="for models with a decoder of their own: 0,5")
    parser.add_argument("--check", type=Path, help="whole checkpoint to compare with")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--whole", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve or args.whole:
        (serve if args.serve else whole)(args.serve or args.whole)
        return
    if not args.shards or not (args.text or args.ids):
        parser.error("give shards, and --text or --ids")
    inputs = _inputs(args)
    output = run(args.shards, inputs)
    for name, value in output.items():
        print(f"{name}: {tuple(value.shape)} {value.dtype}, mean {value.double().mean():.6g}")
    if args.check:
        with _start("--whole", args.check) as checker:
            _send(checker.stdin, Handoff(inputs=inputs).to_bytes())
            expected = load(_receive(checker.stdout))
        wrong = [name for name in output if not torch.equal(output[name], expected[name])]
        print(
            "differs from the whole model: " + ", ".join(wrong) if wrong else "equal to the whole model, bit for bit"
        )
        raise SystemExit(bool(wrong))


def _inputs(args: argparse.Namespace) -> dict[str, Tensor]:
    if args.text:
        from transformers import AutoTokenizer

        inputs = dict(AutoTokenizer.from_pretrained(args.shards[0])(args.text, return_tensors="pt"))
    else:
        inputs = {"input_ids": _ids(args.ids)}
    return inputs | ({"decoder_input_ids": _ids(args.decoder_ids)} if args.decoder_ids else {})


def _ids(text: str) -> Tensor:
    return torch.tensor([[int(number) for number in text.split(",")]])


def _tensors(output: Any) -> dict[str, Tensor]:
    return {name: value.contiguous().clone() for name, value in output.items() if isinstance(value, Tensor)}


def _start(role: str, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, role, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _send(pipe: IO[bytes] | None, message: bytes) -> None:
    assert pipe is not None
    pipe.write(len(message).to_bytes(8, "little") + message)
    pipe.flush()


def _receive(pipe: IO[bytes] | None) -> bytes:
    """The next message; empty where the other side has ended."""
    assert pipe is not None
    return pipe.read(int.from_bytes(pipe.read(8), "little"))


if __name__ == "__main__":
    main()
