"""The catalogue of devices: what a card or a processor can do, by its name.

Names are compared whole, after normalisation: never by substring, or a "Quadro T400" would be a T4 and a laptop's
RTX 4090 the desktop card. What is not in the catalogue is an error that asks for figures; none is made up. The
figures are the vendors' peaks for dense matrices, with 32-bit accumulation where they state it; what a node measures
of itself always wins over them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from planner import dtypes
from planner.cluster import Node
from planner.errors import InvalidInput

#: FP32 FLOP/s of one core of a processor that nothing more is known of: two 256-bit FMA units (Intel since Haswell,
#: AMD since Zen 2: 2 units x 8 lanes x 2 FLOP = 32 FLOP a cycle) at 2.5 GHz.
CPU_CORE_FLOP_PER_S = 32 * 2.5e9
#: Part of a card's nominal memory that weights and KV cache can have: error correction takes up to 1/16 of it (an
#: L4 of 24 GB reports 22.5 GiB) and the runtime's context some hundred MB; vLLM's default is 0.9 as well.
USABLE_MEMORY = 0.9
#: Memory taken for such a core: what the leanest instances of the large clouds have.
CPU_CORE_MEMORY_BYTES = 2 * 2**30

#: safetensors' dtype -> the catalogue's columns, best first. A card without bf16 runs such a model in fp16, one
#: without fp8 or int8 units computes in 16 bits, one without fast fp16 (GTX 10xx) in fp32.
_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "F32": ("fp32",),
    "F16": ("fp16", "fp32"),
    "BF16": ("bf16", "fp16", "fp32"),
    "F8_E4M3": ("fp8", "bf16", "fp16", "fp32"),
    "F8_E5M2": ("fp8", "bf16", "fp16", "fp32"),
    "I8": ("int8", "fp16", "fp32"),
    "F64": (),
}
#: Any other dtype is one of packed weights (4 bits in bytes or words: GPTQ, AWQ, MXFP4), unpacked to 16 bits first.
_PACKED = ("bf16", "fp16", "fp32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a device can do at most."""

    name: str
    #: Dense FLOP/s by "fp32", "tf32", "fp16", "bf16", "fp8", "int8"; what it has no units for is absent.
    flop_per_s: Mapping[str, float]
    #: None where machines of one name differ (Apple's unified memory, processors).
    memory_bytes: int | None
    memory_bytes_per_s: float | None
    #: The vendor's document that the figures come from.
    source: str
    #: Of a processor, whose figures are those of all its cores; None for accelerators.
    cores: int | None = None

    def rate(self, dtype: str | None) -> float:
        """FLOP/s for a model of that dtype (safetensors' or torch's name; None: float16).

        Raises:
            InvalidInput: If the catalogue has no figure for it.
        """
        name = dtypes.canonical(dtype) if dtype else "F16"
        for column in _COLUMNS.get(name, _PACKED) if name else ():
            if column in self.flop_per_s:
                return self.flop_per_s[column]
        raise InvalidInput(
            f"the catalogue has no figure for {dtype} on {self.name} ({', '.join(sorted(self.flop_per_s))}); "
            "state the node's flop_per_s",
            details={"field": "flop_per_s", "device": self.name, "dtype": dtype},
        )


def normalised(name: str) -> str:
    """What names are compared by: "NVIDIA A100-SXM4-80GB" and "a100 sxm4 80 GB" are one, "A100" is another.

    Vendors' names (`variants` reads those), trademark signs and words that every name may have are dropped, and so
    are separators; of a processor also what the system adds ("CPU @ 2.40GHz", "64-Core Processor").
    """
    text = re.sub(r"\((?:r|tm|c)\)|[®™]|@\s*[0-9.]+\s*ghz|[0-9]+-core (?=processor)", " ", name.lower())
    text = re.sub(r"(\d+)[\s-]*gi?b\b", r"\1gb", text)
    words = re.findall(r"[a-z0-9+]+", text)
    return "".join(word for word in words if word not in _NOISE)


_VENDORS = frozenset({"nvidia", "amd", "intel", "apple"})
_NOISE = _VENDORS | {"corporation", "gpu", "generation", "graphics", "cpu", "processor"}


def _vendors(name: str) -> frozenset[str]:
    """The vendors that a name states: one, or none."""
    return _VENDORS & set(re.findall(r"[a-z0-9]+", name.lower()))


def catalogue() -> tuple[Device, ...]:
    """Every device known, in the order of the file."""
    return tuple(device for device, _ in _entries())


def lookup(name: str, *, memory_bytes: int | None = None) -> Device:
    """The one device of that name.

    Args:
        name: As torch, the driver or the vendor has it.
        memory_bytes: What is known of its memory; tells variants of one name apart.

    Raises:
        InvalidInput: If the name is not in the catalogue, or is that of several variants.
    """
    found = variants(name, memory_bytes=memory_bytes)
    if len(found) == 1:
        return found[0]
    raise InvalidInput(
        f"{name!r:.100} is the name of several cards ({', '.join(device.name for device in found)}); "
        "give the full name, or the node's memory_bytes",
        details={"field": "device", "device": name[:256], "variants": [device.name for device in found]},
    )


def variants(name: str, *, memory_bytes: int | None = None) -> tuple[Device, ...]:
    """The devices of that name: one, or several variants of one name ("A100").

    Raises:
        InvalidInput: If the name is not in the catalogue.
    """
    # "A10" is NVIDIA's, but an "Apple A10 GPU" is not that one.
    stated = _vendors(name)
    found = tuple(device for device in _by_name().get(normalised(name), ()) if stated <= _vendors(device.name))
    if len(found) > 1 and memory_bytes is not None:
        # A card reports a little less than its nominal memory, never more.
        sizes = [(device.memory_bytes or 0, device) for device in found]
        found = tuple(device for size, device in sizes if 0.85 * size <= memory_bytes <= 1.01 * size) or found
    if found:
        return found
    raise InvalidInput(
        f"{name!r:.100} is not in the catalogue of {len(_entries())} devices; "
        "state the node's flop_per_s and memory_bytes (and memory_bytes_per_s if you know it)",
        details={"field": "device", "device": name[:256]},
    )


def complete_node(
    *,
    node_id: str,
    dtype: str | None = None,
    flop_per_s: float | None = None,
    memory_bytes: int | None = None,
    memory_bytes_per_s: float | None = None,
    load: float | None = None,
    device: str | None = None,
    gpu_available: bool | None = None,
    gpu_name: str | None = None,
    gpu_usage_percent: float | None = None,
    cpu_cores: int | None = None,
) -> Node:
    """The node that these fields, ours and the williw protocol's, describe; what is stated wins over the catalogue.

    Raises:
        InvalidInput: If FLOP/s or memory is not stated and does not follow from the device; `details["field"]` names
            the field that is missing or wrong.
    """
    card = gpu_name if gpu_available is not False else None
    name = device or card
    if load is None:
        # The card's usage says nothing of the processor, if that is what computes here.
        load = (gpu_usage_percent or 0.0) / 100 if gpu_available is not False else 0.0
    if flop_per_s is None or memory_bytes is None:
        known: dict[str, Any]
        if name is not None:
            known = _from_catalogue(name, dtype, "device" if device else "gpu_name", memory_bytes, cpu_cores)
        elif gpu_available:
            raise InvalidInput(
                "is required where gpu_available is true (or state flop_per_s and memory_bytes)",
                details={"field": "gpu_name"},
            )
        elif cpu_cores is not None:
            name = f"{cpu_cores} CPU cores"
            known = {
                "flop_per_s": cpu_cores * CPU_CORE_FLOP_PER_S,
                "memory_bytes": cpu_cores * CPU_CORE_MEMORY_BYTES,
                "memory_bytes_per_s": None,
            }
        else:
            known = {"flop_per_s": None, "memory_bytes": None, "memory_bytes_per_s": None}
        # A stated rate describes the machine as it is: the catalogue's bandwidth is then no longer its pair.
        if memory_bytes_per_s is None and flop_per_s is None:
            memory_bytes_per_s = known["memory_bytes_per_s"]
        flop_per_s = known["flop_per_s"] if flop_per_s is None else flop_per_s
        memory_bytes = known["memory_bytes"] if memory_bytes is None else memory_bytes
    for field, value in (("flop_per_s", flop_per_s), ("memory_bytes", memory_bytes)):
        if value is None:
            what = "memory size" if field == "memory_bytes" else "FLOP/s"
            why = f"the catalogue has no {what} for {name}" if name else "or a device of the catalogue, or cpu_cores"
            raise InvalidInput(f"is required ({why})", details={"field": field})
    assert flop_per_s is not None
    assert memory_bytes is not None
    return Node(
        node_id=node_id,
        flop_per_s=flop_per_s,
        memory_bytes=memory_bytes,
        memory_bytes_per_s=memory_bytes_per_s,
        load=load,
        device=name,
    )


def _from_catalogue(
    name: str, dtype: str | None, field: str, memory_bytes: int | None, cpu_cores: int | None
) -> dict[str, Any]:
    try:
        found = variants(name, memory_bytes=memory_bytes)
    except InvalidInput as error:
        raise InvalidInput(str(error), details={**error.details, "field": field}) from None
    # Where several variants have the name, the node has at least what the least of them has.
    least: dict[str, Any] = {
        "flop_per_s": min(device.rate(dtype) for device in found),
        "memory_bytes": _least(device.memory_bytes for device in found),
        "memory_bytes_per_s": _least(device.memory_bytes_per_s for device in found),
    }
    if least["memory_bytes"] is not None:
        least["memory_bytes"] = int(least["memory_bytes"] * USABLE_MEMORY)
    cores = found[0].cores
    if cores and cpu_cores:
        # A virtual machine has some of a processor's cores, and its share of the bandwidth.
        share = min(1.0, cpu_cores / cores)
        least["flop_per_s"] *= share
        least["memory_bytes_per_s"] = share * (least["memory_bytes_per_s"] or 0) or None
        least["memory_bytes"] = cpu_cores * CPU_CORE_MEMORY_BYTES
    return least


def _least(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if known else None


@cache
def _entries() -> tuple[tuple[Device, tuple[str, ...]], ...]:
    """Each device with all names it goes by."""
    rows: list[dict[str, Any]] = json.loads(Path(__file__).with_name("devices.json").read_bytes())
    return tuple(
        (
            Device(
                name=row["name"],
                flop_per_s={column: value * 1e12 for column, value in row["tflop_per_s"].items()},
                memory_bytes=None if row["memory_gib"] is None else row["memory_gib"] * 2**30,
                memory_bytes_per_s=row["memory_gb_per_s"] * 1e9,
                source=row["source"],
                cores=row.get("cores"),
            ),
            (row["name"], *row.get("names", ())),
        )
        for row in rows
    )


@cache
def _by_name() -> Mapping[str, tuple[Device, ...]]:
    found: dict[str, tuple[Device, ...]] = {}
    for device, names in _entries():
        for name in dict.fromkeys(normalised(name) for name in names):
            found[name] = (*found.get(name, ()), device)
    return found
