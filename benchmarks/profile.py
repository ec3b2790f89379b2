"""How quick and how small profiling is, beside the ways that others do it.

    python -m benchmarks.profile [fresh|warm|headers|batch|queue|rivals ...] [--runs 5] [--json FILE]

fresh    a new process profiles a local Llama-3.2-1B: without tracing, from a cached trace, with tracing
warm     one process traces large models at full size
headers  the headers of DeepSeek-V3's 91,991 tensors in 163 files
batch    1 to 1,000 different models, one after the other: profiles per second, and what the process grows to
queue    10, 100 and 1,000 different models as one batch each, through API, Redis and one worker
rivals   the same Llama by loading it (float32 and bfloat16; 2.5 GB), accelerate's way, and the Hub client's way

Times are medians; the weights are holes in sparse files, so that the disk takes no part. Ratios count, not seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    # Run as a file, its own folder is first on the path, and this file would hide the standard library's `profile`.
    sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

WIDTH = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
#: Target of each measurement, where the project set one: (name, value, unit).
RESULTS: list[dict[str, Any]] = []


def report(
    name: str, value: float, unit: str, *, target: float | None = None, least: bool = False, note: str = ""
) -> None:
    """Print a figure beside its target: the most that it may be, or the least."""
    passed = None if target is None else (value >= target if least else value <= target)
    RESULTS.append({"name": name, "value": value, "unit": unit, "target": target, "passed": passed, "note": note})
    sign = ">=" if least else "<="
    verdict = "" if passed is None else f"   target {sign} {target:.4g} {unit}: {'ok' if passed else 'MISSED'}"
    print(f"{name:<58} {value:>12,.4g} {unit}{verdict}{'   ' + note if note else ''}", flush=True)


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: list[tuple[str, str, list[int]]], files: int
) -> None:
    """A checkpoint whose headers are real and whose weights are holes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    share = -(-len(tensors) // files)
    for number in range(files):
        mine = tensors[number * share : (number + 1) * share]
        name = "model.safetensors" if files == 1 else f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        header, end = {}, 0
        for tensor, dtype, shape in mine:
            size = prod(shape) * WIDTH[dtype]
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            weight_map[tensor] = name
            end += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def llama(folder: Path, **changes: Any) -> Path:
    """Llama-3.2-1B's shape, in bfloat16, head tied."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16",
        "tie_word_embeddings": True, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, **changes,
    }  # fmt: skip
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    tensors = [("model.embed_tokens.weight", "BF16", [config["vocab_size"], hidden])]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        tensors += [
            (f"{at}.self_attn.q_proj.weight", "BF16", [config["num_attention_heads"] * config["head_dim"], hidden]),
            (f"{at}.self_attn.k_proj.weight", "BF16", [keys, hidden]),
            (f"{at}.self_attn.v_proj.weight", "BF16", [keys, hidden]),
            (f"{at}.self_attn.o_proj.weight", "BF16", [hidden, config["num_attention_heads"] * config["head_dim"]]),
            (f"{at}.mlp.gate_proj.weight", "BF16", [inner, hidden]),
            (f"{at}.mlp.up_proj.weight", "BF16", [inner, hidden]),
            (f"{at}.mlp.down_proj.weight", "BF16", [hidden, inner]),
            (f"{at}.input_layernorm.weight", "BF16", [hidden]),
            (f"{at}.post_attention_layernorm.weight", "BF16", [hidden]),
        ]
    tensors.append(("model.norm.weight", "BF16", [hidden]))
    write_checkpoint(folder, config, tensors, 1)
    return folder


def fresh(code: str, *arguments: str, runs: int) -> tuple[float, float]:
    """Median seconds and largest resident MB of new processes that run `code`."""
    times, sizes = [], []
    for _ in range(runs):
        begin = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"a measured process failed: {code[:200]}")
        times.append(time.perf_counter() - begin)
        sizes.append(usage.ru_maxrss / 1024)
    return statistics.median(times), max(sizes)


_PROFILE = """
import sys
from pathlib import Path
from workers.downloader import resolve
from workers.generator import generate
cache = Path(sys.argv[3]) if len(sys.argv) > 3 else None
generate(resolve(Path(sys.argv[1])), compute=sys.argv[2] != "headers", cache_dir=cache, lean=sys.argv[2] == "lean")
"""


def measure_fresh(folder: Path, runs: int) -> None:
    model = str(llama(folder / "owner" / "llama-1b"))
    start, _ = fresh("pass", runs=runs)
    report("python's start", start, "s")
    seconds, size = fresh(_PROFILE, model, "headers", runs=runs)
    report("fresh, without tracing", seconds, "s", target=start + 0.1)
    report("fresh, without tracing, resident", size, "MB", target=40)
    cache = str(folder / "traces")
    fresh(_PROFILE, model, "trace", cache, runs=1)
    seconds, size = fresh(_PROFILE, model, "trace", cache, runs=runs)
    report("fresh, from a cached trace", seconds, "s")
    report("fresh, from a cached trace, resident", size, "MB")
    # A lazy `import transformers` loads no model; what tracing one needs is what any use of it would load.
    imports, _ = fresh("import torch, transformers", runs=runs)
    report("import torch, transformers", imports, "s")
    needed, _ = fresh("import torch, transformers; transformers.LlamaForCausalLM", runs=runs)
    report("import torch, transformers and its Llama", needed, "s")
    seconds, size = fresh(_PROFILE, model, "lean", runs=runs)
    report(
        "fresh, with tracing", seconds, "s", target=1.2 * imports + 0.3, note=f"{seconds / needed:.2f} x its imports"
    )
    report("fresh, with tracing, resident", size, "MB", target=500)
    seconds, size = fresh(_PROFILE, model, "trace", runs=runs)
    report("the same in a process that is not ours alone", seconds, "s", note=f"{seconds / needed:.2f} x its imports")


def timed(what: Callable[[], Any], runs: int) -> float:
    what()
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        what()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure_warm(folder: Path, runs: int) -> None:
    del folder
    from support.models.architectures import PUBLISHED, as_stored

    from workers.checkpoint.config import ModelConfig
    from workers.profiling.tracing.skeleton import build
    from workers.profiling.tracing.tracer import trace

    targets = {"meta-llama/Llama-3.1-8B": 0.15, "deepseek-ai/DeepSeek-V3": 0.2, "state-spaces/mamba-2.8b-hf": 0.4}
    for name, target in targets.items():
        values = PUBLISHED[name]
        config = ModelConfig(values=values, model_type=values["model_type"], architecture=values["architectures"][0])
        names = as_stored(build(config))
        seconds = timed(lambda config=config, names=names: trace(config, names), runs)  # type: ignore[misc]
        report(f"warm, traced: {name}", seconds, "s", target=target)
    import resource

    report("warm, resident after all", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "MB", target=500)


def measure_headers(folder: Path, runs: int) -> None:
    from workers.checkpoint.folder import open_folder
    from workers.checkpoint.headers import read_headers

    tensors = []
    for layer in range(61):
        experts = 256 if layer >= 3 else 1
        for expert in range(experts):
            for part, shape in (("gate", [2048, 7168]), ("up", [2048, 7168]), ("down", [7168, 2048])):
                at = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
                tensors += [(f"{at}.weight", "F8_E4M3", shape), (f"{at}.weight_scale_inv", "F32", [16, 56])]
    tensors = (tensors + [(f"model.extra.{n}", "BF16", [7168]) for n in range(91_991)])[:91_991]
    write_checkpoint(folder / "owner" / "deepseek", {}, tensors, 163)
    checkpoint = open_folder(folder / "owner" / "deepseek")
    report("91,991 tensors' headers", timed(lambda: read_headers(checkpoint), runs), "s", target=0.4)


_BATCH = """
import json, resource, sys, time
from pathlib import Path
from workers.downloader import resolve
from workers.generator import generate
folders = sorted(Path(sys.argv[1]).iterdir())
generate(resolve(folders[0]))
results = []
begin = time.perf_counter()
for number, folder in enumerate(folders, start=1):
    generate(resolve(folder))
    if number in (1, 10, 100, 1000):
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
        results.append((number, time.perf_counter() - begin, resident))
print(json.dumps(results))
"""


def measure_batch(folder: Path, runs: int) -> None:
    del runs
    for number in range(1000):
        # Different in depth and width, so that no trace is another's.
        llama(
            folder / "batch" / f"m{number:04d}",
            num_hidden_layers=4 + number % 40,
            intermediate_size=1024 + 64 * (number // 40),
        )
    done = subprocess.run(
        [sys.executable, "-c", _BATCH, str(folder / "batch")],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    for number, seconds, resident in json.loads(done.stdout):
        report(
            f"{number} different models",
            number / seconds,
            "profiles/s on one core",
            note=f"{resident:.0f} MB resident",
        )


_LOADING = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
layers = [{"name": n, "shape": list(t.shape), "num_params": t.numel(), "compute_required": 2 * t.numel()}
          for n, t in model.state_dict().items()]
"""
_ACCELERATE = """
import sys
from accelerate import init_empty_weights
from accelerate.utils import calculate_maximum_sizes
from transformers import AutoConfig, AutoModel
with init_empty_weights():
    model = AutoModel.from_config(AutoConfig.from_pretrained(sys.argv[1]))
calculate_maximum_sizes(model)
"""
_HUB = """
import sys
from huggingface_hub import get_safetensors_metadata
get_safetensors_metadata(sys.argv[1])
"""
_OURS_HUB = """
import sys
from workers.downloader import resolve
from workers.generator import generate
generate(resolve(sys.argv[1]), compute=False)
"""


def measure_rivals(folder: Path, runs: int) -> None:
    model = str(llama(folder / "owner" / "llama-rival"))
    ours, size = fresh(_PROFILE, model, "headers", runs=runs)
    exact, exact_size = fresh(_PROFILE, model, "lean", runs=runs)
    for name, code, arguments in (
        ("by loading the model, float32", _LOADING, (model, "float32")),
        ("by loading the model, bfloat16", _LOADING, (model, "bfloat16")),
        ("accelerate estimate-memory's way", _ACCELERATE, (model,)),
    ):
        seconds, resident = fresh(code, *arguments, runs=max(1, runs // 3))
        report(name, seconds, "s", note=f"{resident:.0f} MB resident")
        report(f"{name}, over ours from headers", seconds / ours, "x",
               note=f"{resident / size:.1f} x its memory")  # fmt: skip
        report(f"{name}, over ours exact", seconds / exact, "x",
               note=f"{resident / exact_size:.1f} x its memory")  # fmt: skip
    from hub.server import TestHub

    with TestHub() as hub, tempfile.TemporaryDirectory() as home:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": home}
        hub.add_repo("owner/llama", Path(model))
        theirs, _ = fresh(_HUB, "owner/llama", runs=runs)
        seconds, _ = fresh(_OURS_HUB, "owner/llama", runs=runs)
        report("huggingface_hub.get_safetensors_metadata, loopback", theirs, "s")
        report("ours from the same Hub, profile included", seconds, "s")
        report("get_safetensors_metadata, over ours", theirs / seconds, "x")


def measure_queue(folder: Path, runs: int) -> None:
    del runs
    from benchmarks import profile_queue

    profile_queue.measure(folder, write=llama, report=report)


PARTS = {
    "fresh": measure_fresh,
    "warm": measure_warm,
    "headers": measure_headers,
    "batch": measure_batch,
    "queue": measure_queue,
    "rivals": measure_rivals,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="default: all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for part in arguments.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](Path(folder), arguments.runs)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(RESULTS, indent=2))
    return int(any(result["passed"] is False for result in RESULTS))


if __name__ == "__main__":
    sys.exit(main())
