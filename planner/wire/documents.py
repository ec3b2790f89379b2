"""JSON and YAML text <-> plain objects, safe on text from strangers.

YAML is read with JSON's scalars only (the core of YAML 1.2), since the 1.1 rules turn a node named `no` into False,
`1:30` into 90, a time into an object of Python's and `24e9` into a string. Aliases are refused: a few lines of them
unfold into gigabytes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from planner.errors import InvalidInput, NodeFailure, NotFound
from planner.limits import MAX_JSON_BYTES, MAX_YAML_BYTES

if TYPE_CHECKING:
    import yaml


#: Lists and objects within each other in YAML; a plan has six.
_DEEPEST = 100


def dumps(obj: object) -> bytes:
    """JSON text of `obj`, UTF-8, indented by two, with a newline at its end.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON cannot say.
    """
    return (json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def dumps_yaml(obj: object) -> bytes:
    """YAML text of `obj`, UTF-8, that `loads_yaml` and any other YAML reader take for the same object."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """SafeDumper that also quotes what our reader, but not YAML 1.1, takes for a number; writes no aliases."""

        yaml_implicit_resolvers = {  # noqa: RUF012  (the base's attribute; a merged copy of it)
            first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_resolvers().get(first, [])]
            for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_resolvers()}
        }

        def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
            return True

        def represent_str(self, data: str) -> yaml.ScalarNode:
            # Other styles would write a line separator as it is, and readers take it for a line's end.
            return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')

    Dumper.add_representer(str, Dumper.represent_str)
    return str(yaml.dump(obj, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)).encode()


def loads_json(text: bytes, *, source: str = "the document") -> Any:
    """The object that JSON text means.

    Raises:
        InvalidInput: If it is not JSON (duplicate keys, NaN and infinities included) or larger than
            `MAX_JSON_BYTES`.
    """
    _check_size(text, MAX_JSON_BYTES, source, "JSON")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise InvalidInput(f"{source} nests too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, numbers of over 4,300 digits
        raise InvalidInput(f"{source} is not JSON: {error}") from None


def loads_yaml(text: bytes, *, source: str = "the document") -> Any:
    """The object that YAML text means, JSON's kinds of values only.

    Raises:
        InvalidInput: If it is not YAML, has aliases, tags or duplicate keys, or is larger than `MAX_YAML_BYTES`.
    """
    import yaml

    _check_size(text, MAX_YAML_BYTES, source, "YAML")
    base: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[valid-type,misc]
        """The safe loader with JSON's scalars and no duplicate keys."""

        yaml_implicit_resolvers = _resolvers()
        yaml_constructors = {  # no other tag means anything here
            f"tag:yaml.org,2002:{name}": yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{name}"]
            for name in ("null", "bool", "str", "seq", "map")
        } | {None: yaml.SafeLoader.yaml_constructors[None]}

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if not isinstance(key, str):
                    raise yaml.constructor.ConstructorError(
                        None, None, f"keys must be strings, got {key!r:.60}", node.start_mark
                    )
            _unique([(key, None) for key in keys])
            return dict(super().construct_mapping(node, deep=deep))

    Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
    Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value))
    try:
        depth = 0
        for event in yaml.parse(text, Loader=base):
            if isinstance(event, yaml.AliasEvent):
                raise InvalidInput(f"{source} uses YAML aliases (*name); write the values out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise InvalidInput(f"{source} nests too deeply")
        return yaml.load(text, Loader=Loader)  # nosec B506  # noqa: S506  (a SafeLoader, made stricter)
    except RecursionError:
        raise InvalidInput(f"{source} nests too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidInput(f"{source} is not YAML: {' '.join(str(error).split())}") from None


def load_file(path: str | Path) -> Any:
    """The object in a JSON or YAML file: by its suffix, and by its content where the suffix says neither.

    Raises:
        NotFound: If there is no such file.
        InvalidInput: If it is neither JSON nor YAML; the message says where.
        NodeFailure: If it cannot be read.
    """
    path = Path(path)
    yaml_file = path.suffix.lower() in {".yaml", ".yml"}
    try:
        with path.open("rb") as file:
            text = file.read((MAX_YAML_BYTES if yaml_file else MAX_JSON_BYTES) + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no file {path}", details={"path": str(path)}) from None
    except IsADirectoryError:
        raise InvalidInput(f"{path} is a folder, not a file", details={"path": str(path)}) from None
    except (OSError, ValueError) as error:
        raise NodeFailure(f"{path} cannot be read: {error}", details={"path": str(path)}) from error
    looks_like_json = path.suffix.lower() == ".json" or text.lstrip()[:1] in {b"{", b"["}
    return (
        loads_yaml(text, source=str(path)) if yaml_file or not looks_like_json else loads_json(text, source=str(path))
    )


def _check_size(text: bytes, largest: int, source: str, kind: str) -> None:
    if len(text) > largest:
        raise InvalidInput(f"{source} is larger than the {largest:,} bytes of {kind} that are read")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.80} is there twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that JSON has")


def _resolvers() -> dict[str | None, list[tuple[str, re.Pattern[str]]]]:
    """First character -> what a plain scalar that begins with it may be."""
    tag = "tag:yaml.org,2002:"
    number = re.compile(r"[-+]?(?:0|[1-9][0-9]*)$")
    real = re.compile(
        r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"  # numbers, and refused as such
    )
    resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {
        first: [(tag + "int", number), (tag + "float", real)] for first in "-+0123456789."
    }
    for first in "tTfF":
        resolvers[first] = [(tag + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"))]
    null = re.compile(r"(?:~|null|Null|NULL|)$")
    for empty in ("~", "n", "N", ""):
        resolvers[empty] = [(tag + "null", null)]
    return resolvers
