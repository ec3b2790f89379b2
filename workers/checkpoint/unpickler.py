"""An interpreter for pickles of `torch.save` that runs nothing of what they ask for.

A pickle is a program. This knows the opcodes that build plain values, and the few functions that rebuild a tensor.
Anything else is refused, and the message names it.
"""

from __future__ import annotations

import io
import pickletools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from planner.dtypes import bits, canonical
from planner.errors import InvalidCheckpoint

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip


#: More than the largest checkpoints take, at about 40 steps a tensor: what builds more fills memory and time.
_MOST_STEPS = 8_000_000
_MOST_ON_STACK = 200_000
#: A tensor has fewer dimensions, and a name fewer characters.
_MOST_DIMENSIONS = 64
_LONGEST_KEY = 10_000


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of values in the file, by its key in the pickle."""

    key: str
    dtype: str
    numel: int

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return self.numel * (bits(self.dtype) or 8) // 8


@dataclass(frozen=True, slots=True)
class View:
    """A tensor: a strided view of a storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether its values lie one after the other in its own order."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= max(size, 1)
        return True

    @property
    def last(self) -> int:
        """One past the last value of the storage that it reads."""
        if not prod(self.shape):
            return self.offset
        return self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)) + 1


class Incomplete(InvalidCheckpoint):
    """The pickle goes on beyond the bytes at hand."""


@dataclass(frozen=True, slots=True)
class _Name:
    """A global that the pickle names; only those known here ever do anything."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """Joined only when it is used: a pickle can name two long strings again and again."""
        return f"{self.module}.{self.name}"


class Machine:
    """Interprets pickles whose programs build dicts of tensors."""

    def __init__(self, file: str) -> None:
        self._file = file
        self.storages: dict[str, Storage] = {}
        self._pairs_given = 0

    def run(self, data: io.BytesIO) -> Any:
        """The value that the next pickle of `data` builds.

        Raises:
            InvalidCheckpoint: If it asks for anything that is not known here.
            Incomplete: If it goes on beyond the data.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools decodes texts of old protocols with a warning
            return self._run(data)

    def _run(self, data: io.BytesIO) -> Any:
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}
        operations = pickletools.genops(data)
        for _ in range(_MOST_STEPS):
            try:
                opcode, argument, _place = next(operations)
            except (ValueError, StopIteration, UnicodeDecodeError) as error:
                raise Incomplete(f"{self._file}: the pickle is malformed or cut short: {str(error)[:120]}") from error
            if opcode.name == "STOP":
                return self._pop(stack)
            try:
                self._step(opcode.name, argument, stack, marks, memo)
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise InvalidCheckpoint(f"{self._file}: malformed pickle at {opcode.name}: {error!r}") from error
            if len(stack) > _MOST_ON_STACK or len(marks) > _MOST_ON_STACK:
                raise InvalidCheckpoint(f"{self._file}: the pickle piles up {_MOST_ON_STACK:,} values: refused")
        raise InvalidCheckpoint(f"{self._file}: the pickle takes more than {_MOST_STEPS:,} steps: refused")

    def _pop(self, stack: list[Any]) -> Any:
        if not stack:
            raise InvalidCheckpoint(f"{self._file}: the pickle builds nothing")
        return stack.pop()

    def _step(self, opcode: str, argument: Any, stack: list[Any], marks: list[int], memo: dict[int, Any]) -> None:
        if opcode in _LITERALS:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode]())
        elif opcode in {"PROTO", "FRAME"}:
            pass
        elif opcode == "MARK":
            marks.append(len(stack))
        elif opcode in {"PUT", "BINPUT", "LONG_BINPUT"}:
            memo[int(argument)] = stack[-1]
        elif opcode == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif opcode in {"GET", "BINGET", "LONG_BINGET"}:
            stack.append(memo[int(argument)])
        elif opcode == "GLOBAL":
            module, _, name = argument.partition(" ")
            stack.append(_Name(module, name))
        elif opcode == "STACK_GLOBAL":
            name, module = _of(stack.pop(), str), _of(stack.pop(), str)
            stack.append(_Name(module, name))
        elif opcode in {"TUPLE1", "TUPLE2", "TUPLE3"}:
            count = int(opcode[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode == "TUPLE":
            stack.append(tuple(_marked(stack, marks)))
        elif opcode == "LIST":
            stack.append(_marked(stack, marks))
        elif opcode == "APPEND":
            each = stack.pop()
            _of(stack[-1], list).append(each)
        elif opcode == "APPENDS":
            several = _marked(stack, marks)
            _of(stack[-1], list).extend(several)
        elif opcode == "SETITEM":
            each, key = stack.pop(), stack.pop()
            _of(stack[-1], dict)[_key(key)] = each
        elif opcode in {"SETITEMS", "DICT"}:
            flat = _marked(stack, marks)
            if opcode == "DICT":
                stack.append({})
            _of(stack[-1], dict).update(_pairs(zip(flat[::2], flat[1::2], strict=True)))
        elif opcode == "BUILD":
            # A state dict carries `_metadata`, which no tensor needs.
            stack.pop()
        elif opcode == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif opcode in {"BINPERSID", "PERSID"}:
            stack.append(self._storage(stack.pop() if opcode == "BINPERSID" else argument))
        else:
            raise InvalidCheckpoint(f"{self._file}: the pickle uses {opcode}, which no checkpoint needs: refused")

    def _call(self, function: Any, arguments: Any) -> Any:
        path = function.path if isinstance(function, _Name) else repr(type(function).__name__)
        if path == "collections.OrderedDict":
            return self._ordered(*arguments)
        if path in {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"}:
            storage, offset, shape, stride = arguments[:4]
            _check_plain(*arguments[6:7])
            return _view(storage, None, offset, shape, stride)
        if path == "torch._utils._rebuild_tensor_v3":
            storage, offset, shape, stride, _, _, dtype = arguments[:7]
            _check_plain(*arguments[7:8])
            return _view(storage, dtype, offset, shape, stride)
        if path == "torch._utils._rebuild_parameter":
            return arguments[0]
        if path == "torch.Size":
            return _of(arguments[0], tuple)
        raise InvalidCheckpoint(
            f"{self._file}: the pickle calls {path[:120]}, which rebuilds no tensor: refused, nothing was run",
            details={"file": self._file, "name": path[:200]},
        )

    def _ordered(self, pairs: Sequence[Any] = ()) -> dict[str | int, Any]:
        """A dict of pairs given at once, as Python 2 wrote them; counted, as one list can be given often."""
        self._pairs_given += len(pairs)
        if self._pairs_given > _MOST_ON_STACK:
            raise InvalidCheckpoint(f"{self._file}: the pickle gives dicts {self._pairs_given:,} pairs: refused")
        return _pairs(pairs)

    def _storage(self, reference: Any) -> Storage:
        kind, storage_type, key, _, numel = reference[:5]
        of = _of(storage_type, _Name)
        if kind != "storage" or of.module not in {"torch", "torch.storage", "torch.cuda"} or of.name not in _STORAGES:
            raise InvalidCheckpoint(f"{self._file}: the pickle refers to {of.path[:120]}, which is no tensor storage")
        if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 2**60:
            raise InvalidCheckpoint(f"{self._file}: a storage of {str(numel)[:40]} values is impossible")
        if len(reference) > 5 and reference[5] is not None:
            raise InvalidCheckpoint(f"{self._file}: a storage that is a view of another; `torch.save` it anew")
        return self.storages.setdefault(key, Storage(key, _STORAGES[of.name], numel))


#: Opcodes that push their argument.
_LITERALS = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING",
    "BINBYTES", "SHORT_BINBYTES", "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT",
    "FLOAT",
}  # fmt: skip
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}


def _marked(stack: list[Any], marks: list[int]) -> list[Any]:
    """Take the values above the last mark, and the mark."""
    at = marks.pop()
    taken = stack[at:]
    del stack[at:]
    return taken


def _key(value: Any) -> str | int:
    """A dict's key: what nests would be hashed level by level, beyond what the interpreter's own stack bears."""
    if (type(value) is str and len(value) <= _LONGEST_KEY) or (type(value) is int and abs(value) < 2**63):
        return value
    raise TypeError(f"a {type(value).__name__} as a key, or one of impossible size")


def _pairs(items: Iterable[tuple[Any, Any]] = ()) -> dict[str | int, Any]:
    return {_key(key): value for key, value in items}


def _check_plain(metadata: Any = None) -> None:
    """The values are the stored bytes', not their negatives or conjugates."""
    for name in ("neg", "conj"):
        if metadata and _of(metadata, dict).get(name):
            raise TypeError(f"a tensor that is stored as another's {name} view; `torch.save` it resolved")


def _of(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} is needed")
    return value


def _view(storage: Any, dtype: Any, offset: Any, shape: Any, stride: Any) -> View:
    if not isinstance(storage, Storage):
        raise TypeError("a tensor of no storage")
    sizes, steps = _of(shape, tuple), _of(stride, tuple)  # as torch writes them; copies of a list would pile up
    if len(sizes) != len(steps) or len(sizes) > _MOST_DIMENSIONS:
        raise TypeError("a tensor whose shape and strides do not go together")
    if not all(type(each) is int and abs(each) < 2**63 for each in (offset, *sizes, *steps)):
        raise TypeError("a tensor whose shape and strides are not whole numbers of 64 bits")
    name = storage.dtype
    if dtype is not None:
        found = canonical(dtype.path) if isinstance(dtype, _Name) else None
        if found is None:
            raise TypeError("a tensor of unknown dtype")
        name = found
    return View(storage, name, offset, sizes, steps)
