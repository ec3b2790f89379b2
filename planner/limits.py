"""How large what is asked for may be, in one place for the API, the command line and the metadata reader."""

from __future__ import annotations

import re

from planner.errors import InvalidInput

#: Sequences in one pass; far beyond what serves, well below where products of sizes lose their exactness.
MAX_BATCH_SIZE = 65_536
#: Tokens in one sequence; the longest contexts published are 10 Mi tokens.
MAX_SEQUENCE_LENGTH = 16_777_216
#: Layers, or tensors in metadata of the williw form (DeepSeek-V3 has 91,991).
MAX_LAYERS = 200_000
#: Nodes in a cluster.
MAX_NODES = 100_000
#: One exbibyte: no memory, file or offset is larger.
MAX_BYTES = 2**60
#: FLOP, FLOP/s and bytes per second; a float holds it and so do its products with times.
MAX_QUANTITY = 1e30
#: A year: no latency or time budget is longer.
MAX_SECONDS = 31_536_000.0
#: Bytes of a JSON document that is read; DeepSeek-V3's metadata with all its tensors takes 20 MB.
MAX_JSON_BYTES = 128 * 2**20
#: Bytes of a YAML document that is read; its parser is some hundred times slower than JSON's.
MAX_YAML_BYTES = 8 * 2**20


def _check_count(value: object, field: str, largest: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest:
        return value
    shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."
    raise InvalidInput(
        f"{field} must be a whole number from 1 to {largest:,}, got {shown}",
        details={"field": field, "smallest": 1, "largest": largest},
    )


def check_batch_size(value: object) -> int:
    """Return `value` if it is a batch size.

    Raises:
        InvalidInput: If it is not a whole number from 1 to `MAX_BATCH_SIZE`.
    """
    return _check_count(value, "batch_size", MAX_BATCH_SIZE)


def check_sequence_length(value: object) -> int:
    """Return `value` if it is a sequence length in tokens.

    Raises:
        InvalidInput: If it is not a whole number from 1 to `MAX_SEQUENCE_LENGTH`.
    """
    return _check_count(value, "sequence_length", MAX_SEQUENCE_LENGTH)


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from "2GiB", "500 MB" or "1e9"; the unit in any case, a point for the fraction.

    Raises:
        InvalidInput: If it is none of these, or above `MAX_BYTES`.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e\d{1,2})?)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    if found and found[2] in _UNITS:
        value = float(found[1]) * _UNITS[found[2]]
        if value <= MAX_BYTES:
            return int(value)
    shown = repr(text) if len(repr(text)) <= 40 else f"{repr(text)[:37]}..."
    raise InvalidInput(f"must be a size such as 2GiB, 500MB or 1000000000, got {shown}")
