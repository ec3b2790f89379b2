"""A frame: what one hop carries, and all that its receiver checks before it computes anything.

    "FSF1" | blake3 of what follows (32 bytes) | length of the head (4 bytes, little-endian) | head (JSON) | body

The head says of which run, plan and revision the body is, for which pass and step, the number of the frame, who sent
it to whom, and each tensor's dtype and shape. The body is safetensors (`Handoff.to_bytes`), which can hold no code.
Nothing in it is believed: a frame that is cut, too large, changed, or of another form is refused here, and one that
belongs elsewhere by the session that it names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from blake3 import blake3

from planner.errors import IntegrityError, InvalidInput, LimitExceeded

MAGIC = b"FSF1"
_DIGEST_BYTES = 32
_FIXED_BYTES = len(MAGIC) + _DIGEST_BYTES + 4
#: Largest head: a hop hands on some hundred tensors at most, of some hundred bytes each.
LARGEST_HEAD_BYTES = 1 << 20
#: What `kind` may be: a hop to the next stage, or the model's output to the start node.
KINDS = ("hop", "output")
_TEXTS = ("kind", "run_id", "plan_id", "revision", "sender", "receiver")
_NUMBERS = ("pass_number", "step", "sequence")
_LONGEST_TEXT = 256

#: Tensor -> (dtype as safetensors names it, shape).
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a frame says of itself."""

    kind: str
    run_id: str
    plan_id: str
    revision: str
    sender: str
    receiver: str
    #: Pass of the run, from 0: the prompt, then a token each.
    pass_number: int
    #: Step of the chain that the receiver is to run, from 1; one beyond the last for an output.
    step: int
    #: The run's frames are counted from 1, over all its nodes.
    sequence: int
    #: What the body holds.
    tensors: Tensors

    def to_json(self) -> dict[str, Any]:
        """The head's object."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A frame that is whole: its digest is right, and head and body agree."""

    head: Head
    body: bytes


def pack(body: bytes, **head: Any) -> tuple[bytes, bytes]:
    """A frame as two pieces that are sent one after the other, so that the body is not copied.

    Args:
        body: Safetensors.
        head: The fields of `Head`, but for `tensors`.
    """
    said = Head(**head, tensors=tensors_of(body)).to_json()
    text = json.dumps(said, separators=(",", ":")).encode()
    length = len(text).to_bytes(4, "little")
    digest = blake3(length)
    digest.update(text)
    digest.update(body)
    return MAGIC + digest.digest() + length + text, body


def read_frame(read: Callable[[int], bytes], length: int, *, largest_bytes: int) -> Frame:
    """The frame of `length` bytes that `read` gives.

    Args:
        read: Gives so many bytes, or fewer where there are no more.
        length: As its sender announced it.
        largest_bytes: More is refused before it is read.

    Raises:
        InvalidInput: If it is no frame, or a piece is missing; says which.
        IntegrityError: If it was changed on its way.
        LimitExceeded: If it is too large.
    """
    if length > largest_bytes:
        raise LimitExceeded(
            f"a frame of {length:,} bytes is larger than this node takes, {largest_bytes:,} "
            "(FAIRSHARD_MAX_FRAME_BYTES)",
            details={"bytes": length, "largest_bytes": largest_bytes, "setting": "FAIRSHARD_MAX_FRAME_BYTES"},
        )
    fixed = _exactly(read, min(_FIXED_BYTES, max(0, length)), "beginning")
    if len(fixed) < _FIXED_BYTES or not fixed.startswith(MAGIC):
        raise InvalidInput("not a frame: it does not begin as one")
    head_length = int.from_bytes(fixed[-4:], "little")
    if not 0 < head_length <= min(LARGEST_HEAD_BYTES, length - _FIXED_BYTES):
        raise InvalidInput(f"not a frame: its head would have {head_length:,} bytes of {length:,}")
    text = _exactly(read, head_length, "head")
    body = _exactly(read, length - _FIXED_BYTES - head_length, "body")
    digest = blake3(fixed[-4:])
    digest.update(text)
    digest.update(body)
    if digest.digest() != fixed[len(MAGIC) : len(MAGIC) + _DIGEST_BYTES]:
        raise IntegrityError("a frame was changed on its way: its blake3 digest is another")
    head = _head(text)
    found = tensors_of(body)
    if found != head.tensors:
        wrong = sorted({name for name, _ in found.items() ^ head.tensors.items()})
        raise InvalidInput(
            f"a frame's head and body disagree on {wrong[0]!r:.200}: {head.tensors.get(wrong[0])} and "
            f"{found.get(wrong[0])}",
            details={"tensors": wrong[:20]},
        )
    return Frame(head=head, body=body)


def _exactly(read: Callable[[int], bytes], count: int, what: str) -> bytes:
    found = read(count)
    if len(found) != count:
        raise InvalidInput(f"a frame was cut: {len(found):,} of {count:,} bytes of its {what} came")
    return found


def _head(text: bytes) -> Head:
    try:
        said = json.loads(text)
        if not isinstance(said, dict) or said.keys() != {item.name for item in fields(Head)}:
            raise ValueError("its fields are others")
        if not all(isinstance(said[name], str) and 0 < len(said[name]) <= _LONGEST_TEXT for name in _TEXTS):
            raise ValueError("a name is no text")
        if not all(type(said[name]) is int and 0 <= said[name] < 2**53 for name in _NUMBERS):
            raise ValueError("a number is none")
        if said["kind"] not in KINDS:
            raise ValueError(f"its kind is {said['kind']!r:.50}")
        if not isinstance(said["tensors"], dict):
            raise ValueError("its tensors are no object")
        tensors = {name: _described(entry) for name, entry in said["tensors"].items()}
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidInput(f"a frame's head cannot be read: {error!s:.200}") from None
    return Head(**{**said, "tensors": tensors})


def _described(entry: Any) -> tuple[str, tuple[int, ...]]:
    dtype, shape = entry
    if not isinstance(dtype, str) or not all(type(size) is int and 0 <= size < 2**53 for size in shape):
        raise ValueError("a tensor is described wrongly")
    return dtype, tuple(shape)


def tensors_of(body: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What safetensors bytes hold, by their own header.

    Raises:
        InvalidInput: If they are none.
    """
    length = int.from_bytes(body[:8], "little")
    try:
        if not 2 <= length <= len(body) - 8:
            raise ValueError(f"a header of {length:,} bytes in {len(body):,}")
        header = json.loads(body[8 : 8 + length])
        return {
            name: _described((entry["dtype"], entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"a frame's body is no safetensors: {error!s:.200}") from None
