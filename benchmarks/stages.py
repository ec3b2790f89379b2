"""What running in stages costs: load time and memory of a stage, and the chain's time over the whole model's.

    python -m benchmarks.stages [CHECKPOINT] [--stages 3] [--tokens 128] [--new-tokens 16] [--repeat 20]

Without a checkpoint a random llama of 0.4 GB is made. Each stage is loaded in a process of its own; the chain is then
run in one process, each handoff through its bytes, alternating with the whole model: a pass without a cache, and
tokens after a prompt with one.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers

from planner.cluster import Cluster, Node
from planner.plan import PlanOptions
from planner.strategies.make import plan_for
from workers.downloader import resolve
from workers.generator import generate
from workers.runtime.generation import Driver, prepare
from workers.runtime.payload import Handoff
from workers.runtime.session import Session
from workers.runtime.stage import Stage
from workers.splitter import load_stage, split

_LOAD = """
import sys, time
import torch, transformers, workers.runtime.stage
from workers.splitter import load_stage
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
before, begin = anonymous(), time.perf_counter()
stage = load_stage(sys.argv[1])
taken, grown = time.perf_counter() - begin, anonymous() - before
print(taken, grown, sum(p.untyped_storage().nbytes() for p in stage.parameters()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="What running in stages costs.")
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = args.checkpoint or _make(Path(folder) / "own" / "model")
        checkpoint = resolve(source)
        profile = generate(checkpoint, compute=False)
        count = len(profile.layers)
        bounds = [round(count * at / args.stages) for at in range(args.stages + 1)]
        runs = {f"n{at}": tuple(range(bounds[at], bounds[at + 1])) for at in range(args.stages)}
        nodes = tuple(Node(node_id=name, flop_per_s=1e12, memory_bytes=2**40) for name in runs)
        plan = plan_for(profile, Cluster(nodes=nodes), PlanOptions(), runs)
        shards = [Path(folder) / name for name in runs]
        for shard in shards:
            split(checkpoint, profile, plan, node_id=shard.name, output=shard)
        for shard in shards:
            ran = subprocess.run(
                [sys.executable, "-c", _LOAD, str(shard)], capture_output=True, text=True, check=True
            )
            seconds, grown, weights = (float(number) for number in ran.stdout.split())
            print(
                f"{shard.name}: loaded in {seconds:.2f} s, {grown / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights"
            )
        stages = [load_stage(shard) for shard in shards]
        kind = getattr(transformers, transformers.AutoConfig.from_pretrained(source).architectures[0])
        model: Any = kind.from_pretrained(source).eval()
        _chain(model, stages, args.tokens, args.repeat)
        _decode(model, stages, args.tokens, args.new_tokens, max(args.repeat // 4, 5))


def _chain(model: Any, stages: list[Stage], tokens: int, repeat: int) -> None:
    inputs = {"input_ids": torch.randint(0, 1000, (1, tokens))}

    def chain() -> Any:
        step: Any = Handoff(inputs=inputs)
        for stage in stages:
            step = stage(step)
            step = Handoff.from_bytes(step.to_bytes()) if isinstance(step, Handoff) else step
        return step

    begin = time.perf_counter()
    chain()
    print(f"first pass, with the trace in each stage: {1000 * (time.perf_counter() - begin):.1f} ms")
    runs: dict[str, Callable[[], Any]] = {"whole": lambda: model(**inputs), "chain": chain}
    times: dict[str, list[float]] = {"whole": [], "chain": []}
    with torch.no_grad():
        for _ in range(repeat):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begin)
    whole, chained = (statistics.median(times[name]) * 1000 for name in ("whole", "chain"))
    print(
        f"{tokens} tokens: whole {whole:.1f} ms, {len(stages)} stages {chained:.1f} ms, ratio {chained / whole:.2f}"
    )


class _Clock(transformers.StoppingCriteria):
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(1, dtype=torch.bool)

    def noted(self, _: Mapping[int, int]) -> None:
        """The same, as a chain tells it."""
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of the first token, and of each after it."""
        return [later - earlier for earlier, later in pairwise(self.times)]


def _decode(model: Any, stages: list[Stage], tokens: int, new: int, repeat: int) -> None:
    inputs = {"input_ids": torch.randint(3, 1000, (1, tokens))}

    def whole() -> list[float]:
        clock = _Clock()
        criteria = transformers.StoppingCriteriaList([clock])
        model.generate(**inputs, max_new_tokens=new, do_sample=False, use_cache=True, eos_token_id=None,
                       stopping_criteria=criteria)  # fmt: skip
        return clock.seconds

    def chain() -> list[float]:
        sessions = [Session(stage, batch=1, length=tokens + new) for stage in stages]
        clock = _Clock()

        def send(step: Handoff) -> Mapping[str, torch.Tensor]:
            for session in sessions:
                answer = session.step(step)
                if isinstance(answer, Handoff):
                    step = Handoff.from_bytes(answer.to_bytes())
            output: Mapping[str, torch.Tensor] = answer
            return output

        Driver(stages[0], send).generate(inputs, max_new_tokens=new, endless=True, on_token=clock.noted)
        return clock.seconds

    begin = time.perf_counter()
    prepare(stages[0], batch=1, length=tokens)
    print(f"a stage is prepared for {tokens} tokens and those after it in {time.perf_counter() - begin:.2f} s")
    times: dict[str, list[list[float]]] = {"whole": [], "chain": []}
    whole(), chain()
    for _ in range(repeat):
        times["whole"].append(whole())
        times["chain"].append(chain())
    for what, part in (("first token", slice(0, 1)), ("each further token", slice(1, None))):
        one, many = (
            1000 * statistics.median(second for run in times[name] for second in run[part]) for name in times
        )
        print(f"{what}: whole {one:.1f} ms, {len(stages)} stages {many:.1f} ms, ratio {many / one:.2f}")


def _make(folder: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
