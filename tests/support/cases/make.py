"""Small checkpoints as people have them: config, index and headers from `checkpoints/*.json`, weights of zeros.

    expect = make("quant-mlx4", folder)       # {"num_params": 426_624}

Each file says why it matters (`why`) and what is right (`expect`):

`num_params`
    Parameters of the model, counted on transformers' own class (quantised: of the unquantised model).
`missing`
    Tensors that transformers' loader reports missing; each must be named.
`weights`
    The file that transformers loads (seen in the loaded values).
`refused`
    No profile, and the message does this.
`works_with`
    The option with which it works.
`kv_cache_bytes_true`
    Bytes of the cache that transformers fills on the real model, float32, batch 1, 24 tokens.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "checkpoints"
#: dtype -> bits of an element.
BITS = {
    "F64": 64, "I64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16, "U16": 16,
    "U8": 8, "I8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
}  # fmt: skip

#: Every case.
NAMES: tuple[str, ...] = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def named(*beginnings: str) -> tuple[str, ...]:
    """The cases whose names begin so."""
    return tuple(name for name in NAMES if name.startswith(beginnings))


def case(name: str) -> dict[str, Any]:
    """A case as its file has it: `why`, `expect`, `files`."""
    found: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def make(name: str, folder: Path) -> dict[str, Any]:
    """Write the case's files below `folder`; returns what is expected of them."""
    found = case(name)
    for file, content in found["files"].items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if "json" in content:
            path.write_text(json.dumps(content["json"]), encoding="utf-8")
        elif "base64" in content:
            path.write_bytes(base64.b64decode(content["base64"]))
        else:
            write_zeros(path, content["tensors"])
    expect: dict[str, Any] = found["expect"]
    return expect


def write_zeros(path: Path, tensors: Mapping[str, Sequence[Any]]) -> None:
    """Write a safetensors file of zeros that takes no room on the disk.

    Args:
        path: The file.
        tensors: Name -> (dtype as safetensors spells it, shape).
    """
    header, end = {}, 0
    for tensor, (dtype, shape) in tensors.items():
        size = prod(shape) * BITS[dtype] // 8
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
