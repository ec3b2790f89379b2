"""A quick start for processes that only trace: transformers without what it imports beside its models.

Half the time to a process's first trace goes into importing torch's compiler, symbolic shapes, distributed tensors,
scipy and accelerate. torch and transformers import them with every model. A trace works with plain numbers and uses
only the few names that stand in for them here; whatever else is asked of a stand-in, the real module answers.

This knows the insides of torch and transformers, so it works only with the versions in `KNOWN_VERSIONS`. With other
versions, or with `FAIRSHARD_LEAN=0`, the tracer is imported in the plain way: twice the time, the same result.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Mapping
from importlib.metadata import version
from types import ModuleType
from typing import Any

from workers.collector import uncollected
from workers.settings import Settings

#: Package -> its versions (major.minor) for which the tests compared a lean trace with a plain one.
KNOWN_VERSIONS: Mapping[str, frozenset[str]] = {"torch": frozenset({"2.13"}), "transformers": frozenset({"5.23"})}
#: transformers does without them, as in an environment that has none.
_OPTIONAL = ("accelerate", "scipy")


def start_lean() -> bool:
    """Import the tracer without them, in a process of our own that neither compiles nor distributes models.

    Returns:
        Whether it did. Not where transformers is imported already, its version or torch's is not one of
        `KNOWN_VERSIONS`, or FAIRSHARD_LEAN is 0; the tracer can be imported as usual then.
    """
    if "transformers" in sys.modules or not Settings.from_env().lean:
        return False
    if any(_minor(package) not in known for package, known in KNOWN_VERSIONS.items()):
        return False
    with uncollected():
        _stand_in()
        importlib.import_module("workers.profiling.tracing.tracer")
        # None of it is garbage, not even when the process ends: looking through it then takes most of a second.
        gc.freeze()
    return True


def _minor(package: str) -> str:
    """The installed version's first two numbers."""
    return ".".join(version(package).split(".")[:2])


def _stand_in() -> None:
    import torch.distributed

    for name in _OPTIONAL:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # how Python itself notes that there is none
    vars(torch.distributed)["is_available"] = lambda: False
    vars(torch.compiler)["disable"] = _undecorated
    for name, attributes in _STAND_INS.items():
        if name not in sys.modules:
            sys.modules[name] = _StandIn(name, attributes)


class _StandIn(ModuleType):
    """Stands for a module until something is asked of it that only the real one does."""

    def __init__(self, name: str, attributes: Mapping[str, Any]) -> None:
        super().__init__(name)
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        # Python asks every module for these names; it asks for a package's path only to import from the package.
        if name.startswith("__") and not (name == "__path__" and self.__name__ in _PACKAGES):
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def _real(name: str) -> ModuleType:
    """Import the real module, after removing the stand-ins of what it builds on."""
    for each in (name,) if name == _ALGEBRA else tuple(_STAND_INS):
        stand_in = sys.modules.get(each)
        if isinstance(stand_in, _StandIn):
            del sys.modules[each]
            for attribute in _STAND_INS[each]:  # who imported it before gets all from the real one as well
                vars(stand_in).pop(attribute)
    return importlib.import_module(name)


def _undecorated(function: Any = None, *_: Any, **__: Any) -> Any:
    return function if function is not None else _undecorated


def _plain_equal(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_plain_equal, one, other))
    return bool(one == other)


def _masks_by_index() -> Any:
    """The real context for vectorised masks, of which eager attention needs none."""
    return _real(_MASKS).TransformGetItemToIndex()


_COMPILER = "torch._dynamo"
_MASKS = f"{_COMPILER}._trace_wrapped_higher_order_op"
_ALGEBRA = "sympy"
_PACKAGES = {_COMPILER, _ALGEBRA}
_STAND_INS: Mapping[str, Mapping[str, Any]] = {
    # Decorators that only the compiler reads.
    _COMPILER: dict.fromkeys(
        ("allow_in_graph", "assume_constant_result", "disable", "mark_static_address"), _undecorated
    ),
    _MASKS: {"TransformGetItemToIndex": _masks_by_index},
    # What these answer where sizes are plain numbers.
    "torch.fx.experimental.symbolic_shapes": {
        **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious"), bool),
        "statically_known_true": bool,
        "guard_int": int,
        "guarding_hint_or_throw": lambda number: number,
        "has_guarding_hint": lambda _: True,
        "is_nested_int": lambda _: False,
        "sym_and": lambda *each: all(each),
        "sym_eq": _plain_equal,
        "sym_or": lambda *each: any(each),
    },
    _ALGEBRA: {"Basic": type("Basic", (), {})},
}
