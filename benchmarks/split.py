"""How long shards take, against what else one could do with the same bytes; alternating in one run.

    python benchmarks/split.py local  [--size-gb 2.5] [--rounds 5] [--folder DIR]     copies on one machine
    python benchmarks/split.py ranged [--size-gb 1.0] [--rounds 3]                    from the test Hub, near and far
    python benchmarks/split.py growth [--largest-gb 20]                               0.1 to 20 GB, sparse
    python benchmarks/split.py memory                                                 resident bytes by size

A shard is on the disk when it is there, so `cp` is followed by `sync FILE`; the ratio to `cp` alone, which leaves
its bytes in memory, is printed beside it. On XFS and btrfs (--folder) the shards share the checkpoint's blocks.
"first byte" is the time to the first file's space.
Figures are medians, with the smallest and largest beside them; page cache warm unless it says otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Run as a script, this folder is on the path, and its queue.py would pass for the standard library's.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != ROOT / "benchmarks"]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from support.shard_cases import plan_of, profile_of  # noqa: E402

from planner.plan import Plan  # noqa: E402
from planner.profile import ModelProfile  # noqa: E402
from workers.checkpoint.base import Checkpoint  # noqa: E402
from workers.disk.copying import can_clone  # noqa: E402
from workers.downloader import resolve  # noqa: E402
from workers.splitter import split  # noqa: E402

GB = 10**9


def make_checkpoint(
    folder: Path, size_bytes: int, *, sparse: bool = False, files: int = 1, layers: int | None = None
) -> Path:
    """A Llama-shaped bf16 checkpoint of about `size_bytes`: 2,048 wide and as many layers as fit, or as wide as
    `layers` of them may be."""
    width, vocabulary = 2048, 128256 if size_bytes > GB and not layers else 16384
    if layers:
        # Three matrices of 4 w^2, two of w^2 and two of w^2 / 4 a layer, 2 bytes each, and 16,384 embeddings of w.
        a, b = 29 * layers, 2 * vocabulary
        width = round((math.sqrt(b * b + 4 * a * size_bytes) - b) / (2 * a) / 64) * 64
    inner = 4 * width
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    one = 2 * (2 * width + 3 * width * inner + 2 * width * width + 2 * (width // 4) * width)
    for layer in range(layers or max(4, round((size_bytes - 2 * vocabulary * width) / one))):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + "input_layernorm.weight": (width,), prefix + "post_attention_layernorm.weight": (width,)}
        shapes |= {prefix + f"mlp.{p}_proj.weight": (inner, width) for p in ("gate", "up")}
        shapes |= {prefix + "mlp.down_proj.weight": (width, inner)}
        shapes |= {prefix + f"self_attn.{p}_proj.weight": (width // 4 if p in "kv" else width, width) for p in "kqvo"}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    names = sorted(shapes)
    per_file = -(-len(names) // files)
    noise = os.urandom(64 * 2**20)
    weight_map = {}
    for number in range(files):
        name = "model.safetensors" if files == 1 else f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        entries, at = {}, 0
        for tensor in names[number * per_file : (number + 1) * per_file]:
            size = 2 * math.prod(shapes[tensor])
            entries[tensor] = {"dtype": "BF16", "shape": shapes[tensor], "data_offsets": [at, at + size]}
            weight_map[tensor] = name
            at += size
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            if sparse:
                file.truncate(8 + len(header) + at)
            else:
                while at > 0:
                    file.write(noise[:at])
                    at -= len(noise)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def case(source: Checkpoint, parts: int) -> tuple[ModelProfile, Plan]:
    """A plan of contiguous parts in execution order."""
    profile = profile_of(source)

    def place(name: str) -> tuple[int, int]:
        number = name.rpartition(".")[2]
        return (1, int(number)) if number.isdigit() else (0 if "embed" in name else 2, 0)

    names = sorted((layer.name for layer in profile.layers), key=place)
    sizes = {layer.name: layer.weight_bytes for layer in profile.layers}
    share, allocation, filled = sum(sizes.values()) / parts, dict[str, list[str]](), 0
    for name in names:
        node = f"n{min(parts - 1, int(filled / share))}"
        allocation.setdefault(node, []).append(name)
        filled += sizes[name]
    return profile, plan_of(profile, allocation)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alternate(
    ways: dict[str, Callable[[], object]], *, rounds: int, clear: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of each way, one after the other in each round; the first round only warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            clear()
            seconds = timed(work)
            if number:
                found[name].append(seconds)
    return found


def table(found: dict[str, list[float]], *, against: Sequence[str]) -> None:
    bases = [statistics.median(found[name]) for name in against]
    print(f"{'':42}{'median s':>10}{'min':>8}{'max':>8}" + "".join(f"{'/ ' + name:>28}" for name in against))
    for name, values in found.items():
        middle = statistics.median(values)
        ratios = "".join(f"{middle / base:28.2f}" for base in bases)
        print(f"{name:42}{middle:10.3f}{min(values):8.3f}{max(values):8.3f}{ratios}")


def local(folder: Path, *, size_bytes: int, rounds: int, slow: bool) -> None:
    source = resolve(make_checkpoint(folder / "own/model", size_bytes))
    profile, plan = case(source, 3)
    out, copies = folder / "out", folder / "copies"
    pieces = folder / "pieces"
    for node in plan.allocation:
        split(source, profile, plan, node_id=node, output=pieces / node, digests=False)

    def clear() -> None:
        for path in (out, copies):
            shutil.rmtree(path, ignore_errors=True)
        copies.mkdir()
        os.sync()

    def ours(*, digests: bool = True) -> None:
        for node in plan.allocation:
            split(source, profile, plan, node_id=node, output=out / node, digests=digests)

    def cp(*, sync: bool) -> None:
        for node in plan.allocation:
            for piece in sorted((pieces / node).glob("*.safetensors")):
                target = str(copies / f"{node}-{piece.name}")
                subprocess.run(["cp", "--reflink=never", str(piece), target], check=True)
                if sync:
                    subprocess.run(["sync", target], check=True)

    ways: dict[str, Callable[[], object]] = {
        "cp --reflink=never, sync": lambda: cp(sync=True),
        "fairshard, no digests": lambda: ours(digests=False),
        "fairshard, digests": ours,
        "cp --reflink=never": lambda: cp(sync=False),
    }
    if slow:
        ways |= torch_ways(source, profile, plan, out)
    size = sum((folder / "own/model" / name).stat().st_size for name in source.files)
    print(f"\n{size / GB:.2f} GB to 3 nodes, local, warm, {rounds} rounds, load {os.getloadavg()[0]:.1f}")
    table(alternate(ways, rounds=rounds, clear=clear), against=["cp --reflink=never, sync", "cp --reflink=never"])
    whole = plan_of(profile, {"n": [layer.name for layer in profile.layers]}, plan_id="whole")
    shared = {"all on one node, linked": (whole, "n")}
    if can_clone(source.local_path("model.safetensors") or folder, folder):
        shared["all on one node, reflinked"] = shared.pop("all on one node, linked")
        shared |= {f"a third on {node}, reflinked": (plan, node) for node in plan.allocation}
    for what, (planned, node) in shared.items():
        took = []
        for number in range(rounds):
            os.sync()
            output = folder / f"shared{number}-{node}" / node
            work = lambda: split(source, profile, planned, node_id=node, output=output)  # noqa: E731, B023
            took.append(timed(work))
        print(f"{what}: {1000 * statistics.median(took):.1f} ms ({1000 * min(took):.1f} to {1000 * max(took):.1f})")


def torch_ways(source: Checkpoint, profile: ModelProfile, plan: Plan, out: Path) -> dict[str, Callable[[], object]]:
    """What libraries offer: load, select, save."""
    from huggingface_hub import save_torch_state_dict
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = str(source.local_path("model.safetensors"))
    held = {
        node: [t.name for layer in profile.layers if layer.name in names for t in layer.tensors]
        for node, names in plan.allocation.items()
    }

    def selected() -> None:
        for node, names in held.items():
            out.mkdir(exist_ok=True)
            with safe_open(path, "pt") as file:
                save_file({name: file.get_tensor(name) for name in names}, out / f"{node}.safetensors")
            subprocess.run(["sync", str(out / f"{node}.safetensors")], check=True)

    def sharder() -> None:
        for node, names in held.items():
            state = load_file(path)
            (out / node).mkdir(parents=True)
            save_torch_state_dict({name: state[name] for name in names}, out / node)
            subprocess.run(["sync", str(out / node / "model.safetensors")], check=True)

    def whole() -> None:
        import torch

        for node, names in held.items():
            state = {name: tensor.to(torch.float32) for name, tensor in load_file(path).items()}
            out.mkdir(exist_ok=True)
            torch.save({name: state[name] for name in names}, out / f"{node}.pt")
            subprocess.run(["sync", str(out / f"{node}.pt")], check=True)

    return {
        "safetensors: open, select, save": selected,
        "huggingface_hub: load, save_torch_state_dict": sharder,
        "load all in float32, torch.save": whole,
    }


def ranged(folder: Path, *, size_bytes: int, rounds: int) -> None:
    checkpoint = make_checkpoint(folder / "own/model", size_bytes, files=5)
    for name, settings in {
        "loopback": (),
        "30 ms, 40 MB/s a connection": ("--latency", ".03", "--rate", "40e6"),
    }.items():
        server = subprocess.Popen(
            [sys.executable, "-m", "hub.server", *settings, f"own/model={checkpoint}"],
            cwd=ROOT / "tests",
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            hub = json.loads(server.stdout.readline())
            os.environ |= {"HF_ENDPOINT": hub["url"], "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            compare_ranged(folder, name, hub["url"], rounds)
        finally:
            server.kill()
            server.wait()


def compare_ranged(folder: Path, name: str, url: str, rounds: int) -> None:
    import urllib.request

    from huggingface_hub import snapshot_download

    profile, plan = case(resolve("own/model"), 4)
    node = list(plan.allocation)[1]
    home = folder / "hf"

    def served() -> int:
        with urllib.request.urlopen(f"{url}/_hub/counters") as reply:
            return sum(r["sent_bytes"] for r in json.load(reply))

    def clear() -> None:
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(folder / "shard", ignore_errors=True)
        os.sync()

    def ours() -> None:
        os.environ["HF_HUB_CACHE"] = str(home / "none")
        split(resolve("own/model"), profile, plan, node_id=node, output=folder / "shard/ours")

    def theirs() -> None:
        path = snapshot_download("own/model", cache_dir=home, endpoint=url)
        split(resolve(Path(path)), profile, plan, node_id=node, output=folder / "shard/theirs")

    clear()
    before = served()
    ours()
    fetched = served() - before
    kept = sum(path.stat().st_size for path in (folder / "shard/ours").rglob("*.safetensors"))
    total = sum(layer.weight_bytes for layer in profile.layers)
    print(f"\n{name}: {kept / 1e6:.0f} of {total / 1e6:.0f} MB; {fetched / kept:.4f} x the shard's bytes were sent")
    ways: dict[str, Callable[[], object]] = {"snapshot_download, then split": theirs, "fairshard, ranged": ours}
    table(alternate(ways, rounds=rounds, clear=clear), against=["snapshot_download, then split"])


def growth(folder: Path, *, largest_bytes: int) -> None:
    for what, layers in (("more layers", None), ("the same 38 tensors, larger", 4)):
        print(f"\n{what}\n{'GB':>8}{'tensors':>9}{'shard GB':>10}{'seconds':>9}{'s per GB':>10}{'first byte ms':>15}")
        size = GB // 10
        while size <= largest_bytes:
            grown(folder / f"{layers}-{size}", size, layers)
            size = min(size * 4, largest_bytes) if size < largest_bytes else largest_bytes + 1


def grown(place: Path, size_bytes: int, layers: int | None) -> None:
    files = max(1, size_bytes // (5 * GB))
    source = resolve(make_checkpoint(place / "own/model", size_bytes, sparse=True, files=files, layers=layers))
    profile, plan = case(source, 4)
    first: list[float] = []

    def watch() -> None:
        while not first:
            for path in place.glob(".shard.partial-*/model*.safetensors"):
                if path.stat().st_size > 2**20:
                    first.append(time.perf_counter() - began)
                    return
            time.sleep(0.0005)

    began = time.perf_counter()
    thread = threading.Thread(target=watch)
    thread.start()
    manifest = split(source, profile, plan, node_id="n1", output=place / "shard")
    seconds = time.perf_counter() - began
    thread.join(1)
    gb, total = manifest.total_bytes / GB, sum(layer.weight_bytes for layer in profile.layers) / GB
    tensors = sum(len(layer.tensors) for layer in profile.layers)
    shown = 1000 * (first or [0.0])[0]
    print(f"{total:8.2f}{tensors:9}{gb:10.3f}{seconds:9.3f}{seconds / gb:10.3f}{shown:15.1f}", flush=True)
    first.append(0.0)
    shutil.rmtree(place)


def memory(folder: Path) -> None:
    """Peak resident bytes of a process that does nothing but split, beyond those of a bare Python."""
    code = (
        "import sys; sys.path[:0] = {paths!r}\n"
        # ru_maxrss would count the parent's before the exec.
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "bare = peak()\n"
        "import json; from pathlib import Path\n"
        "from shard_cases import profile_of\n"
        "from benchmarks.split import case\n"
        "from workers.downloader import resolve; from workers.splitter import split\n"
        "source = resolve(Path(sys.argv[1])); profile, plan = case(source, 3)\n"
        "split(source, profile, plan, node_id='n1', output=Path(sys.argv[2]))\n"
        "print((peak() - bare) / 1024, 'torch' in sys.modules, 'numpy' in sys.modules)\n"
    ).format(paths=[str(ROOT / "tests"), str(ROOT)])
    print(f"\n{'GB':>6}{'MiB beyond Python':>20}   torch, numpy loaded")
    for size in (GB // 10, GB, 3 * GB):
        place = folder / f"m{size}"
        make_checkpoint(place / "own/model", size, sparse=True)
        done = subprocess.run(
            [sys.executable, "-c", code, str(place / "own/model"), str(place / "shard")],
            check=True,
            capture_output=True,
            text=True,
        )
        used, *loaded = done.stdout.split()
        print(f"{size / GB:6.1f}{float(used):20.1f}   {', '.join(loaded)}")
        shutil.rmtree(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["local", "ranged", "growth", "memory"])
    parser.add_argument("--size-gb", type=float)
    parser.add_argument("--largest-gb", type=float, default=20)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--no-torch", action="store_true", help="leave out the ways that load tensors")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="split-", dir=args.folder) as name:
        folder = Path(name)
        if args.part == "local":
            size = round((args.size_gb or 2.5) * GB)
            local(folder, size_bytes=size, rounds=args.rounds or 5, slow=not args.no_torch)
        elif args.part == "ranged":
            ranged(folder, size_bytes=round((args.size_gb or 1.0) * GB), rounds=args.rounds or 3)
        elif args.part == "growth":
            growth(folder, largest_bytes=round(args.largest_gb * GB))
        else:
            memory(folder)
    print(
        f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB", file=sys.stderr
    )


if __name__ == "__main__":
    main()
