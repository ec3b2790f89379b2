"""A frame arrives as it was sent, or is refused by name; no bytes whatever bring the parser down."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import FairshardError, IntegrityError, InvalidInput, LimitExceeded
from workers.runner.frame import Frame, pack, read_frame
from workers.runtime.payload import Handoff

HEAD: dict[str, Any] = {
    "kind": "hop", "run_id": "0123456789abcdef", "plan_id": "feed", "revision": "main", "sender": "a",
    "receiver": "b", "pass_number": 3, "step": 2, "sequence": 11,
}  # fmt: skip
BODY = Handoff(
    inputs={"input_ids": torch.arange(6).view(2, 3)},
    values={"model.layers.0#0:0": torch.ones(2, 3, 8, dtype=torch.bfloat16)},
    plan_id="feed",
).to_bytes()
WHOLE = b"".join(pack(BODY, **HEAD))


def read(data: bytes, *, length: int | None = None, largest_bytes: int = 1 << 20) -> Frame:
    return read_frame(io.BytesIO(data).read, len(data) if length is None else length, largest_bytes=largest_bytes)


def signed(text: bytes, body: bytes) -> bytes:
    from blake3 import blake3

    rest = len(text).to_bytes(4, "little") + text + body
    return b"FSF1" + blake3(rest).digest() + rest


def test_a_frame_arrives_as_it_was_sent() -> None:
    frame = read(WHOLE)
    assert frame.body == BODY
    assert {name: getattr(frame.head, name) for name in HEAD} == HEAD
    assert frame.head.tensors == {
        "input/input_ids": ("I64", (2, 3)),
        "value/model.layers.0#0:0": ("BF16", (2, 3, 8)),
    }
    assert torch.equal(Handoff.from_bytes(frame.body).inputs["input_ids"], torch.arange(6).view(2, 3))


def changed(**fields: Any) -> bytes:
    return signed(json.dumps({**read(WHOLE).head.to_json(), **fields}).encode(), BODY)


@pytest.mark.parametrize(
    ("data", "kind", "says"),
    [
        (b"", InvalidInput, "does not begin"),
        (b"GET / HTTP/1.1\r\n" * 9, InvalidInput, "does not begin"),
        (WHOLE[:36] + (2**31).to_bytes(4, "little") + WHOLE[40:], InvalidInput, "2,147,483,648 bytes"),
        (WHOLE[:-1] + bytes([WHOLE[-1] ^ 1]), IntegrityError, "digest"),
        (WHOLE[:60] + bytes([WHOLE[60] ^ 1]) + WHOLE[61:], IntegrityError, "digest"),
        (changed(step=-1), InvalidInput, "a number is none"),
        (changed(step=True), InvalidInput, "a number is none"),
        (changed(run_id=""), InvalidInput, "a name is no text"),
        (changed(kind="eval"), InvalidInput, "kind is 'eval'"),
        (changed(more=1), InvalidInput, "its fields are others"),
        (changed(tensors={"input/input_ids": ["F32", [2, 3]]}), InvalidInput, "head and body disagree on"),
        (changed(tensors=[]), InvalidInput, "no object"),
        (signed(b"[" * 100_000, BODY), InvalidInput, "head cannot be read"),
        (signed(json.dumps(read(WHOLE).head.to_json()).encode(), b"{}"), InvalidInput, "no safetensors"),
    ],
)
def test_what_is_wrong_is_refused_by_name(data: bytes, kind: type[FairshardError], says: str) -> None:
    with pytest.raises(kind, match=says):
        read(data)


def test_a_cut_frame_says_how_much_is_missing() -> None:
    with pytest.raises(InvalidInput, match=r"a frame was cut: [\d,]+ of [\d,]+ bytes of its body came"):
        read(WHOLE[:-5], length=len(WHOLE))


def test_a_frame_that_is_too_large_is_refused_before_it_is_read() -> None:
    def never(_: int) -> bytes:
        raise AssertionError("read")

    with pytest.raises(LimitExceeded, match=r"frame of 1,001 bytes .* 1,000 \(FAIRSHARD_MAX_FRAME_BYTES\)"):
        read_frame(never, 1001, largest_bytes=1000)


@given(data=st.binary(max_size=300), at=st.integers(0, len(WHOLE)), cut=st.integers(0, 50), sign=st.booleans())
def test_no_bytes_bring_the_parser_down(data: bytes, at: int, cut: int, sign: bool) -> None:
    damaged = WHOLE[:at] + data + WHOLE[at + cut :]
    if sign:
        text = damaged[40 : 40 + min(len(damaged), int.from_bytes(WHOLE[36:40], "little"))]
        damaged = signed(text, damaged[40 + len(text) :])
    try:
        frame = read(damaged)
    except FairshardError:
        return
    assert frame.head.to_json().keys() == read(WHOLE).head.to_json().keys()
    try:
        Handoff.from_bytes(frame.body)
    except InvalidInput:
        return
