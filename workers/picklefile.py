"""`.bin` checkpoints: where their tensors lie, found without running anything that the pickle asks for.

A pickle is a program. This interpreter knows the opcodes that build plain values and the few names that rebuild a
tensor; anything else is refused by its name. No data is loaded: a tensor is a range of the file.
"""

from __future__ import annotations

import io
import itertools
import pickletools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from planner.dtypes import bits, canonical
from planner.errors import InvalidCheckpoint
from planner.profile import Tensor
from workers.checkpoint import Checkpoint
from workers.zipped import is_zip, read_archive

_MAX_PICKLE_BYTES = 100_000_000
_FIRST_READ_BYTES = 1 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of values in the file, by its key in the pickle."""

    key: str
    dtype: str
    numel: int


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


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a `.bin` file: its view, and where its storage begins in the file."""

    view: View
    begin: int


def read_bin(checkpoint: Checkpoint, name: str) -> tuple[list[Tensor], dict[str, str], int]:
    """Read the tensors of a `.bin` file as ranges of it, as `workers.headers.read_file` does for safetensors.

    Tensors that share one range (tied weights) are given once, by the first name.

    Raises:
        InvalidCheckpoint: If the file is no state dict, asks for anything but tensors, or has strided tensors.
    """
    return read_shared(checkpoint, name)[0], {}, 0


def read_shared(checkpoint: Checkpoint, name: str) -> tuple[list[Tensor], dict[str, str]]:
    """Read the tensors of a `.bin` file as ranges of it, and the names that share another tensor's range.

    Returns:
        The tensors by place, each range once; name -> name of the tensor with the same range.

    Raises:
        InvalidCheckpoint: As `read_bin`.
    """
    stored = read_views(checkpoint, name)
    tensors: list[Tensor] = []
    seen: dict[tuple[int, int], str] = {}
    aliases: dict[str, str] = {}
    for tensor, each in stored.items():
        if not each.view.contiguous:
            raise InvalidCheckpoint(
                f"{name}: tensor {tensor!r} is stored with strides {list(each.view.stride)}, so that no range of the "
                f"file is the tensor; `fairshard convert` writes it out plainly",
                details={"file": name, "tensor": tensor},
            )
        width = (bits(each.view.dtype) or 8) // 8
        begin = each.begin + each.view.offset * width
        end = begin + prod(each.view.shape) * width
        if begin < end and seen.setdefault((begin, end), tensor) != tensor:
            aliases[tensor] = seen[begin, end]
            continue
        tensors.append(
            Tensor(name=tensor, file=name, dtype=each.view.dtype, shape=each.view.shape, begin=begin, end=end)
        )
    tensors.sort(key=lambda each: (each.begin, each.end))
    for one, other in itertools.pairwise(tensors):
        if other.begin < one.end:
            raise InvalidCheckpoint(
                f"{name}: tensors {one.name!r} and {other.name!r} overlap in part; `fairshard convert` parts them",
                details={"file": name, "tensors": [one.name, other.name]},
            )
    return tensors, aliases


def read_views(checkpoint: Checkpoint, name: str) -> dict[str, Stored]:
    """Every tensor of a `.bin` file by name, with its place; of torch's present format or that before 1.6.

    Raises:
        InvalidCheckpoint: If the file is no state dict of tensors.
    """
    size = checkpoint.files[name].size_bytes
    if is_zip(checkpoint, name):
        archive = read_archive(checkpoint, name)
        pickled = archive.pickle_bytes(_MAX_PICKLE_BYTES)
        state = _Machine(name).run(io.BytesIO(pickled))
        places: Callable[[Storage], int] = lambda storage: archive.place(storage.key, _bytes(storage))  # noqa: E731
    else:
        state, legacy = _read_legacy(checkpoint, name, size)
        places = lambda storage: legacy[storage.key]  # noqa: E731
    if not isinstance(state, dict):
        raise InvalidCheckpoint(f"{name} holds a {type(state).__name__}, not a dict of tensors")
    found = {}
    for key, view in state.items():
        if not isinstance(key, str) or not isinstance(view, View):
            raise InvalidCheckpoint(f"{name}: {str(key)[:80]!r} is a {type(view).__name__}, not a tensor")
        begin = places(view.storage)
        _check_view(name, key, view, begin, size)
        found[key] = Stored(view, begin)
    return found


def _bytes(storage: Storage) -> int:
    return storage.numel * (bits(storage.dtype) or 8) // 8


def _check_view(name: str, key: str, view: View, begin: int, size: int) -> None:
    storage_bytes, width = _bytes(view.storage), (bits(view.dtype) or 8) // 8
    if view.offset < 0 or min(view.shape, default=0) < 0 or min(view.stride, default=0) < 0:
        raise InvalidCheckpoint(f"{name}: tensor {key!r} has a negative offset, shape or stride")
    if view.last * width > storage_bytes:
        raise InvalidCheckpoint(
            f"{name}: tensor {key!r} reads {view.last * width:,} bytes of a storage of {storage_bytes:,}"
        )
    if begin + storage_bytes > size:
        raise InvalidCheckpoint(
            f"{name}: tensor {key!r} ends at byte {begin + storage_bytes:,}, beyond the file's {size:,} (cut short?)"
        )


def _read_legacy(checkpoint: Checkpoint, name: str, size: int) -> tuple[Any, dict[str, int]]:
    """The format before torch 1.6: five pickles, then each storage's length and values."""
    length = min(size, _FIRST_READ_BYTES)
    while True:
        data = io.BytesIO(checkpoint.read(name, 0, length))
        try:
            machine = _Machine(name)
            if machine.run(data) != _LEGACY_MAGIC:
                raise InvalidCheckpoint(f"{name} is no file of torch.save (a Git LFS pointer, or cut short?)")
            machine.run(data)
            machine.run(data)
            state = machine.run(data)
            keys = machine.run(data)
            break
        except _Incomplete as error:
            if length >= size or length >= _MAX_PICKLE_BYTES:
                raise InvalidCheckpoint(f"{name} is no file of torch.save, or is cut short: {error}") from error
            length = min(size, length * 4)
    if not isinstance(keys, list) or not all(key in machine.storages for key in keys if isinstance(key, str)):
        raise InvalidCheckpoint(f"{name}: the list of storages is not one")
    places, at = {}, data.tell()
    for key in keys:
        storage = machine.storages[key]
        places[key] = at + 8
        at += 8 + _bytes(storage)
    return state, places


class _Incomplete(InvalidCheckpoint):
    """The pickle goes on beyond the bytes at hand."""


class _Mark:
    """Where a group of values begins on the stack."""


class _Name:
    """A global that the pickle names; only those known here ever do anything."""

    def __init__(self, path: str) -> None:
        self.path = path


class _Machine:
    """Interprets pickles whose programs build dicts of tensors."""

    def __init__(self, file: str) -> None:
        self._file = file
        self.storages: dict[str, Storage] = {}

    def run(self, data: io.BytesIO) -> Any:
        """The value that the next pickle of `data` builds.

        Raises:
            InvalidCheckpoint: If it asks for anything that is not known here.
            _Incomplete: If it goes on beyond the data.
        """
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        operations = pickletools.genops(data)
        while True:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # pickletools decodes texts of old protocols with a warning
                    opcode, argument, _ = next(operations)
            except (ValueError, StopIteration, UnicodeDecodeError) as error:
                raise _Incomplete(
                    f"{self._file}: the pickle is malformed or cut short: {str(error)[:120]}"
                ) from error
            if opcode.name == "STOP":
                return self._pop(stack)
            try:
                self._step(opcode.name, argument, stack, memo)
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise InvalidCheckpoint(f"{self._file}: malformed pickle at {opcode.name}: {error!r}") from error

    def _pop(self, stack: list[Any]) -> Any:
        if not stack:
            raise InvalidCheckpoint(f"{self._file}: the pickle builds nothing")
        return stack.pop()

    def _step(self, opcode: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
        if opcode in _LITERALS:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode]())
        elif opcode in {"PROTO", "FRAME"}:
            pass
        elif opcode in {"PUT", "BINPUT", "LONG_BINPUT"}:
            memo[int(argument)] = stack[-1]
        elif opcode == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif opcode in {"GET", "BINGET", "LONG_BINGET"}:
            stack.append(memo[int(argument)])
        elif opcode == "GLOBAL":
            stack.append(_Name(argument.replace(" ", ".")))
        elif opcode == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_Name(f"{module}.{name}"))
        elif opcode in {"TUPLE1", "TUPLE2", "TUPLE3"}:
            count = int(opcode[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode == "TUPLE":
            stack.append(tuple(_marked(stack)))
        elif opcode == "LIST":
            stack.append(_marked(stack))
        elif opcode == "APPEND":
            each = stack.pop()
            _of(stack[-1], list).append(each)
        elif opcode == "APPENDS":
            several = _marked(stack)
            _of(stack[-1], list).extend(several)
        elif opcode == "SETITEM":
            each, key = stack.pop(), stack.pop()
            _of(stack[-1], dict)[key] = each
        elif opcode in {"SETITEMS", "DICT"}:
            flat = _marked(stack)
            if opcode == "DICT":
                stack.append({})
            _of(stack[-1], dict).update(zip(flat[::2], flat[1::2], strict=True))
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
            return dict(*arguments)
        if path in {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"}:
            storage, offset, shape, stride = arguments[:4]
            return _view(storage, None, offset, shape, stride)
        if path == "torch._utils._rebuild_tensor_v3":
            storage, offset, shape, stride, _, _, dtype = arguments[:7]
            return _view(storage, dtype, offset, shape, stride)
        if path == "torch._utils._rebuild_parameter":
            return arguments[0]
        if path == "torch.Size":
            return tuple(arguments[0])
        raise InvalidCheckpoint(
            f"{self._file}: the pickle calls {path[:120]}, which rebuilds no tensor: refused, nothing was run",
            details={"file": self._file, "name": path[:200]},
        )

    def _storage(self, reference: Any) -> Storage:
        kind, storage_type, key, _, numel = reference[:5]
        name = storage_type.path.rpartition(".")[2] if isinstance(storage_type, _Name) else ""
        prefix = storage_type.path.rpartition(".")[0] if isinstance(storage_type, _Name) else ""
        if kind != "storage" or prefix not in {"torch", "torch.storage", "torch.cuda"} or name not in _STORAGES:
            raise InvalidCheckpoint(f"{self._file}: the pickle refers to {prefix}.{name}, which is no tensor storage")
        if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 2**60:
            raise InvalidCheckpoint(f"{self._file}: a storage of {str(numel)[:40]} values is impossible")
        if len(reference) > 5 and reference[5] is not None:
            raise InvalidCheckpoint(f"{self._file}: a storage that is a view of another; `torch.save` it anew")
        return self.storages.setdefault(key, Storage(key, _STORAGES[name], numel))


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
    "MARK": _Mark,
}


def _marked(stack: list[Any]) -> list[Any]:
    """Take the values above the last mark, and the mark."""
    at = max(index for index, value in enumerate(stack) if isinstance(value, _Mark))
    taken = stack[at + 1 :]
    del stack[at:]
    return taken


def _of(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} is needed")
    return value


def _view(storage: Any, dtype: Any, offset: Any, shape: Sequence[Any], stride: Sequence[Any]) -> View:
    if not isinstance(storage, Storage):
        raise TypeError("a tensor of no storage")
    sizes, steps = tuple(shape), tuple(stride)
    if len(sizes) != len(steps) or not all(type(each) is int for each in (offset, *sizes, *steps)):
        raise TypeError("a tensor whose shape and strides are not whole numbers")
    name = storage.dtype
    if dtype is not None:
        found = canonical(dtype.path) if isinstance(dtype, _Name) else None
        if found is None:
            raise TypeError("a tensor of unknown dtype")
        name = found
    return View(storage, name, offset, sizes, steps)
