"""How near a plan's seconds and bytes are to what this machine's first device takes for them.

    python -m benchmarks.device [--layers 32] [--tokens 2048] [--batch 1] [--hidden 4096] [--repeat 10]

The device is measured as a node measures itself. A Llama of Llama-3.1-8B's shape is profiled from headers alone (its
weights are holes in a sparse file), planned for that one node, then built with random weights and really run: eager
attention, bfloat16, a prompt and one token more. Planned seconds are what the device's best rates allow; what eager
PyTorch loses beside them (launches, element-wise operators) is the ratio. Planned bytes hold weights, KV cache and
the largest working set.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.profile import llama
from planner.cluster import Cluster, Node
from planner.devices import lookup
from planner.errors import FairshardError
from planner.plan import Plan, PlanOptions
from planner.strategies.make import make_plan
from workers.downloader import resolve
from workers.generator import generate
from workers.nodes.probe import measure

GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="A plan's seconds and bytes against this machine's device.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=10)
    args = parser.parse_args()
    found = measure()
    print(f"{found['device']}: {found['flop_per_s'] / 1e12:.1f} TFLOP/s, {found['memory_bytes_per_s'] / GB:.0f} GB/s,"
          f" {found['memory_bytes'] / GB:.1f} GB offered")  # fmt: skip
    try:
        known = lookup(found["device"])
        print(f"{known.name} of the catalogue: {known.rate('BF16') / 1e12:.1f} TFLOP/s in bfloat16, of which"
              f" {100 * found['flop_per_s'] / known.rate('BF16'):.0f} % were measured")  # fmt: skip
    except FairshardError as error:
        print(f"the catalogue: {error}")
    plans = _plans(args, found)
    seconds, peak = _run(args)
    for phase, plan in plans.items():
        predicted = plan.predicted.bottleneck_s
        print(f"{phase:<8} {1e3 * seconds[phase]:9.2f} ms taken, {1e3 * predicted:9.2f} ms planned:"
              f" {seconds[phase] / predicted:5.2f} x")  # fmt: skip
    if peak:
        # What the plan leaves free is less the working set, too.
        planned = found["memory_bytes"] - plans["prefill"].nodes[0].memory_free_bytes
        print(f"memory   {peak / GB:9.2f} GB taken, {planned / GB:9.2f} GB planned: {peak / planned:5.2f} x")


def _plans(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Plan]:
    node = Node(
        node_id="here",
        flop_per_s=found["flop_per_s"],
        memory_bytes=found["memory_bytes"],
        memory_bytes_per_s=found["memory_bytes_per_s"],
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = resolve(llama(Path(folder) / "own" / "llama", **_shape(args)))
        profile = generate(checkpoint, batch_size=args.batch, sequence_length=args.tokens)
    cluster = Cluster(nodes=(node,))
    return {
        phase: make_plan(profile, cluster, PlanOptions(phase=phase, count_activations=True))
        for phase in ("prefill", "decode")
    }


def _shape(args: argparse.Namespace) -> dict[str, Any]:
    hidden: int = args.hidden
    return {
        "hidden_size": hidden, "intermediate_size": 14336 * hidden // 4096, "num_hidden_layers": args.layers,
        "num_attention_heads": hidden // 128, "num_key_value_heads": max(1, hidden // 512), "head_dim": 128,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    }  # fmt: skip


def _run(args: argparse.Namespace) -> tuple[dict[str, float], int]:
    """Median seconds of a prompt and of a token after it, and the most bytes that were taken on the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.LlamaConfig(vocab_size=128256, dtype="bfloat16", **_shape(args))
    config._attn_implementation = "eager"  # what the profile counts
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).train(mode=False)
        ids = torch.randint(3, 1000, (args.batch, args.tokens + 1))

    def timed(run: Callable[[Any], object], before: Callable[[], object]) -> float:
        times = []
        for number in range(args.repeat + 2):
            given = before()
            _wait(device)
            begin = time.perf_counter()
            run(given)
            _wait(device)
            if number > 1:
                times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def prefill(_: object = None) -> Any:
        return model(ids[:, :-1], use_cache=True)

    with torch.no_grad():
        prefill()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        prefill()
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        return {
            "prefill": timed(prefill, lambda: None),
            "decode": timed(
                lambda cache: model(ids[:, -1:], past_key_values=cache), lambda: prefill().past_key_values
            ),
        }, peak


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
