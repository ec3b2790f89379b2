"""Instances of the planner's benchmark: real model shapes on real machine mixes, and what is meant to be hard."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.cluster import Cluster, Link, Node
from planner.problem.cost import layer_memory_bytes, node_memory_bytes
from planner.profile import Layer, ModelProfile

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Case:
    """One instance."""

    name: str
    model: ModelProfile
    cluster: Cluster
    #: Layers come as few runs of equal ones.
    runs: bool
    #: No plan exists by construction: the bytes needed are more than there are.
    impossible: bool = False
    #: Layers all different, few to a node (under 8), and every node's memory planted: what it has to spare is less
    #: than a layer, so this is packing a puzzle with as many bins as nodes. The best bottleneck hangs on which of the
    #: slowest nodes can be left a layer less, and neither plan nor bound is expected to be as near as elsewhere.
    puzzle: bool = False


def _decoder(
    hidden: int, ffn: int, kv: int, *, active: float = 1.0, window: int | None = None
) -> tuple[int, float, int]:
    """(parameters, active parameters, KV bytes a token): attention with `kv` wide keys, gated feed-forward."""
    attention = 2 * hidden * hidden + 2 * hidden * kv
    return attention + 3 * hidden * ffn, attention + 3 * hidden * ffn * active, 4 * kv


def model(
    name: str,
    blocks: Sequence[tuple[int, float, int]],
    *,
    hidden: int,
    vocab: int,
    tied: bool = False,
    tokens: int = 2048,
    width: float = 2.0,
) -> ModelProfile:
    """A model of those blocks between an embedding and a head, `width` bytes a parameter."""
    table = round(vocab * hidden * width)
    layers = [
        Layer(
            name="embed",
            index=0,
            layer_type="embedding",
            num_params=vocab * hidden,
            weight_bytes=table,
            activation_bytes=tokens * hidden * 2,
        )
    ]
    for params, active, kv in blocks:
        layers.append(
            Layer(
                name=f"layers.{len(layers) - 1}",
                index=len(layers),
                layer_type="decoder",
                num_params=int(params),
                active_params=int(active),
                weight_bytes=round(params * width),
                kv_cache_bytes=kv * tokens,
                activation_bytes=tokens * hidden * 2,
                compute_required=2.0 * active * tokens,
                compute_terms=(0.0, 2.0 * active, 0.0),
            )
        )
    layers.append(
        Layer(
            name="head",
            index=len(layers),
            layer_type="head",
            num_params=0 if tied else vocab * hidden,
            weight_bytes=0 if tied else table,
            tied_to="embed" if tied else None,
            tied_bytes=table if tied else 0,
            activation_bytes=tokens * vocab * 4,
            compute_required=2.0 * tokens * vocab * hidden,
            compute_terms=(0.0, 2.0 * vocab * hidden, 0.0),
        )
    )
    return ModelProfile(model_name=f"bench/{name}", sequence_length=tokens, layers=tuple(layers))


def real_models() -> dict[str, tuple[ModelProfile, bool]]:
    """name -> (model, comes in runs)."""
    small = _decoder(2048, 8192, 512)
    eight = _decoder(4096, 14336, 1024)
    seventy = _decoder(8192, 28672, 1024)
    giant = _decoder(16384, 53248, 1024)
    mixtral = _decoder(4096, 8 * 14336, 1024, active=2 / 8)
    qwen_moe = _decoder(2048, 128 * 768, 512, active=8 / 128)
    dense, sparse = _decoder(7168, 18432, 288), _decoder(7168, 257 * 2048, 288, active=9 / 257)
    local, wide = _decoder(5376, 21504, 2048), _decoder(5376, 21504, 2048)
    local = (local[0], local[1], local[2] // 2)
    linear, full = _decoder(2048, 512 * 512, 128, active=10 / 512), _decoder(2048, 512 * 512, 512, active=10 / 512)
    encoder, decoder = _decoder(1024, 10922, 0), _decoder(1024, 13653, 1024)
    elm = [_decoder(3072, 1536 + 256 * at, 192 * (1 + at // 9)) for at in range(36)]
    return {
        "llama-1b": (model("llama-1b", [small] * 16, hidden=2048, vocab=128256, tied=True), True),
        "llama-8b": (model("llama-8b", [eight] * 32, hidden=4096, vocab=128256), True),
        "llama-70b": (model("llama-70b", [seventy] * 80, hidden=8192, vocab=128256), True),
        "llama-405b": (model("llama-405b", [giant] * 126, hidden=16384, vocab=128256), True),
        "mixtral": (model("mixtral", [mixtral] * 32, hidden=4096, vocab=32000), True),
        "qwen3-30b": (model("qwen3-30b", [qwen_moe] * 48, hidden=2048, vocab=151936), True),
        "deepseek-v3": (
            model("deepseek-v3", [dense] * 3 + [sparse] * 58, hidden=7168, vocab=129280, width=1.0),
            True,
        ),
        "gemma-27b": (
            model(
                "gemma-27b",
                [wide if at % 6 == 5 else local for at in range(62)],
                hidden=5376,
                vocab=262144,
                tied=True,
            ),
            True,
        ),
        "qwen3-next": (
            model("qwen3-next", [full if at % 4 == 3 else linear for at in range(48)], hidden=2048, vocab=151936),
            True,
        ),
        "t5": (model("t5", [encoder] * 24 + [decoder] * 24, hidden=1024, vocab=32128), True),
        "openelm": (model("openelm", elm, hidden=3072, vocab=32000, tied=True), False),
    }


def _encoder_decoder(
    name: str, encoder: tuple[int, float, int], decoder: tuple[int, float, int], blocks: int, *, vocab: int, bias: int
) -> ModelProfile:
    """As many blocks of each, first ones with `bias` parameters more; one table for both embeddings and the head."""
    parts = [
        (params + bias * (at == 0), active, kv) for params, active, kv in (encoder, decoder) for at in range(blocks)
    ]
    plain = model(name, parts, hidden=1024, vocab=vocab, tied=True)
    table = plain.layers[-1].tied_bytes
    again = replace(
        plain.layers[0], name="decoder.embed", num_params=0, weight_bytes=0, tied_to="embed", tied_bytes=table
    )
    layers = [*plain.layers[: blocks + 1], again, *plain.layers[blocks + 1 :]]
    return replace(plain, layers=tuple(replace(layer, index=at) for at, layer in enumerate(layers)))


def tied_models() -> dict[str, ModelProfile]:
    """Models whose encoder's and decoder's embeddings and head are one table."""
    # T5's first blocks hold the relative position biases of all.
    t5 = (_decoder(1024, 2730, 0), _decoder(1024, 4096, 1024))
    bart = (_decoder(1024, 2730, 0), _decoder(1024, 4096, 1024))
    return {
        "t5-large": _encoder_decoder("t5-large", *t5, 24, vocab=32128, bias=512),
        "bart-large": _encoder_decoder("bart-large", *bart, 12, vocab=50265, bias=0),
    }


# FLOP/s are dense 16-bit tensor figures times 0.5, as measured rates come out; bytes/s are the makers'.
_DEVICES = {
    "h100": (4.9e14, 80, 3.35e12),
    "a100": (1.56e14, 80, 2.0e12),
    "4090": (8.2e13, 24, 1.0e12),
    "3090": (3.5e13, 24, 9.4e11),
    "3060": (1.3e13, 12, 3.6e11),
    "t4": (3.2e13, 16, 3.2e11),
    "m2": (1.3e13, 96, 4.0e11),
    "cpu": (1.5e12, 64, 8.0e10),
    "mini": (3.0e11, 8, 2.5e10),
}
_MIXES = {
    "pair": {"4090": 1, "3060": 1},
    "desk": {"4090": 1, "3090": 1, "m2": 1, "cpu": 1},
    "lab": {"a100": 2, "4090": 3, "3090": 3, "t4": 2},
    "rack": {"h100": 8, "a100": 8},
    "wild": {"h100": 1, "a100": 2, "4090": 6, "3090": 8, "3060": 10, "t4": 8, "m2": 5, "cpu": 8},
    "swarm": {"mini": 40, "cpu": 24},
}


def machines(mix: str, seed: int, *, jitter: float = 0.15) -> Cluster:
    """The mix with each machine's measured rate a little off, as no two are quite alike."""
    draw = random.Random(seed)
    nodes = []
    for device, count in _MIXES[mix].items():
        rate, memory, bandwidth = _DEVICES[device]
        for at in range(count):
            nodes.append(
                Node(
                    node_id=f"{device}-{at:02d}",
                    flop_per_s=rate * draw.uniform(1 - jitter, 1 + jitter),
                    memory_bytes=memory * GIB,
                    memory_bytes_per_s=bandwidth,
                )
            )
    return Cluster(nodes=tuple(nodes), default_link=Link(latency_s=0.001, bytes_per_s=1.25e9))


def needed_bytes(profile: ModelProfile) -> int:
    """Weights and KV cache."""
    return sum(layer_memory_bytes(layer) for layer in profile.layers)


def with_memory(cluster: Cluster, total: float) -> Cluster:
    """The same machines with their memory scaled to `total` bytes together."""
    scale = total / sum(node.memory_bytes for node in cluster.nodes)
    return replace(
        cluster,
        nodes=tuple(replace(node, memory_bytes=int(node.memory_bytes * scale)) for node in cluster.nodes),
    )


def planted(cluster: Cluster, profile: ModelProfile, *, spare: float, seed: int) -> Cluster:
    """The same machines with only as much memory as one contiguous plan needs, and `spare` of it more: it fits."""
    draw = random.Random(seed)
    layers = profile.layers
    order = list(cluster.nodes)
    draw.shuffle(order)
    order = order[: len(layers)]
    weight = [node.flop_per_s**0.5 for node in order]
    cuts, total, passed = [0], sum(weight), 0.0
    for at, part in enumerate(weight[:-1]):
        passed += part
        least, most = cuts[-1] + 1, len(layers) - (len(order) - 1 - at)
        cuts.append(min(max(round(passed / total * len(layers)), least), most))
    cuts.append(len(layers))
    room = {
        node.node_id: int(node_memory_bytes(layers[a:b]) * (1 + spare))
        for node, a, b in zip(order, cuts, cuts[1:], strict=False)
    }
    nodes = tuple(replace(node, memory_bytes=room.get(node.node_id, GIB // 64)) for node in cluster.nodes)
    return replace(cluster, nodes=nodes)


def random_model(name: str, count: int, seed: int, kind: str) -> ModelProfile:
    """Layers all different: "uniform", "near" (within 3 %), "steps" (powers of two), "tail" (few large)."""
    draw = random.Random(seed)
    blocks = []
    for _ in range(count):
        size = {
            "uniform": lambda: draw.uniform(0.2, 1.0),
            "near": lambda: draw.uniform(0.97, 1.03),
            "steps": lambda: 2.0 ** draw.randint(-5, 0),
            "tail": lambda: min(4.0, 0.1 / (1.0 - draw.random())),
        }[kind]()
        blocks.append((int(2e8 * size * draw.uniform(0.8, 1.2)), 2e8 * size, 4096))
    return model(name, blocks, hidden=4096, vocab=32000)


def _on(name: str, profile: ModelProfile, mix: str, seed: int, *, runs: bool) -> list[Case]:
    """A model on a mix of machines: as they are, with hardly more memory than it needs, and with less."""
    need = needed_bytes(profile)
    cluster = machines(mix, seed)
    found = []
    if sum(node.memory_bytes for node in cluster.nodes) > need * 1.02:
        found.append(Case(name=f"{name}/{mix}", model=profile, cluster=cluster, runs=runs))
    if mix in ("lab", "wild", "desk"):
        tight = planted(cluster, profile, spare=0.03, seed=seed)
        found.append(Case(name=f"{name}/{mix}/tight", model=profile, cluster=tight, runs=runs))
    if mix in ("pair", "lab"):
        small = with_memory(cluster, need * 0.98)
        found.append(Case(name=f"{name}/{mix}/too-small", model=profile, cluster=small, runs=runs, impossible=True))
    return found


def cases(*, quick: bool = False) -> list[Case]:
    """All instances, in a fixed order."""
    found: list[Case] = []
    seed = 0
    for name, (profile, runs) in real_models().items():
        for mix in _MIXES:
            seed += 1
            found += _on(name, profile, mix, seed, runs=runs)
    for kind in ("uniform", "near", "steps", "tail"):
        for mix in ("desk", "lab", "rack", "wild"):
            for count in (40, 130):
                seed += 1
                profile = random_model(f"{kind}-{count}", count, seed, kind)
                cluster = machines(mix, seed)
                found.append(Case(name=f"{kind}-{count}/{mix}", model=profile, cluster=cluster, runs=False))
                if mix in ("lab", "wild"):
                    puzzle = count < 8 * min(count, len(cluster.nodes))
                    for spare in (0.1,) if puzzle else (0.1, 0.03):
                        name = f"{kind}-{count}/{mix}/{'puzzle' if puzzle else f'tight {spare:.0%}'}"
                        tight = planted(cluster, profile, spare=spare, seed=seed)
                        found.append(Case(name=name, model=profile, cluster=tight, runs=False, puzzle=puzzle))
    # Adversarial: a head heavier than any node's part; nodes that hold one layer exactly; one giant among dwarfs.
    eight, seventy = real_models()["llama-8b"][0], real_models()["llama-70b"][0]
    layer = layer_memory_bytes(seventy.layers[1])
    exact = machines("rack", 7)
    found += [
        Case(name="heavy-head/swarm", model=eight, cluster=machines("swarm", 5), runs=True),
        Case(
            name="one-layer-each",
            model=seventy,
            cluster=Cluster(
                nodes=tuple(
                    Node(node_id=f"n{at:03d}", flop_per_s=1e13 * (1 + at % 7), memory_bytes=layer + GIB // 8)
                    for at in range(90)
                )
                + tuple(Node(node_id=f"big{at}", flop_per_s=1e12, memory_bytes=4 * GIB) for at in range(2)),
            ),
            runs=True,
        ),
        Case(
            name="giant-among-dwarfs",
            model=eight,
            cluster=Cluster(
                nodes=(
                    Node(node_id="giant", flop_per_s=1e15, memory_bytes=2 * GIB),
                    *(Node(node_id=f"dwarf{at}", flop_per_s=1e11, memory_bytes=4 * GIB) for at in range(20)),
                )
            ),
            runs=True,
        ),
        Case(name="exact-fit", model=seventy, cluster=planted(exact, seventy, spare=0.0, seed=1), runs=True),
    ]
    for at, (name, profile) in enumerate(tied_models().items()):
        for seed, mix in enumerate(_MIXES, start=1_000 + 100 * at):
            found += _on(name, profile, mix, seed, runs=True)
    return found[::5] if quick else found
