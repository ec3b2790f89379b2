"""Maps a checkpoint's tensor names to the model's parameters, by transformers' own conversion tables.

`get_model_conversion_mapping` and `rename_source_key` are semi-private: the tests save a checkpoint of every family
and compare, so that a change there is seen.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

#: A name's pieces between the dots; None for a number.
Template = tuple[str | None, ...]
#: Stands for numbers while a template is renamed; no model has so many layers.
_FIRST_MARK = 810_001


class Renamer:
    """Renames tensor names as transformers would when it loads them into `model`."""

    def __init__(self, model: PreTrainedModel, known: Container[str]) -> None:
        transforms = get_model_conversion_mapping(model)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._known = known
        self._templates: dict[Template, tuple[str, str | None] | None] = {}

    def __call__(self, name: str) -> tuple[str, str | None]:
        """The name in the module tree, and the pattern of the conversion (fusing, splitting, ...) that makes it.

        92,000 names follow a few dozen patterns: each pattern is renamed once, with marks for its numbers.
        """
        template, numbers = split(name)
        if template not in self._templates:
            self._templates[template] = self._learn(name, template, numbers)
        known = self._templates[template]
        renamed, pattern = self._rename(name) if known is None else (_filled(known[0], numbers), known[1])
        renamed = self._with_prefix(renamed)
        if renamed not in self._known and name in self._known:
            # As transformers' loader: an old name's renaming hit a name that is right already.
            return self._with_prefix(name), None
        return renamed, pattern

    def _learn(self, name: str, template: Template, numbers: list[str]) -> tuple[str, str | None] | None:
        """The renamed template with marks for numbers, or None if the numbers themselves matter."""
        marks = iter(range(_FIRST_MARK, _FIRST_MARK + len(numbers)))
        marked, pattern = self._rename(joined(template, [str(next(marks)) for _ in numbers]))
        if (_filled(marked, numbers), pattern) != self._rename(name):
            return None
        return marked, pattern

    def _rename(self, name: str) -> tuple[str, str | None]:
        return rename_source_key(name, self._renamings, self._converters)

    def made(self, target: str, pattern: str | None) -> list[str]:
        """Everything that the conversion makes which makes `target`, the first of its results."""
        for converter in self._converters if pattern is not None else ():
            first = converter.target_patterns[0]
            if pattern in converter.source_patterns and first in target:
                return [target.replace(first, each) for each in converter.target_patterns]
        return [target]

    def _with_prefix(self, name: str) -> str:
        """Add or strip the base model's prefix, as `rename_source_key` does."""
        prefix = self._prefix
        if not prefix:
            return name
        if name.startswith(prefix):
            stripped = name.removeprefix(prefix)[1:]
            if stripped in self._known:
                return stripped
        return f"{prefix}.{name}" if f"{prefix}.{name}" in self._known else name


def split(name: str) -> tuple[Template, list[str]]:
    """A name's template and its numbers."""
    pieces = name.split(".")
    numbers = [piece for piece in pieces if piece.isdecimal()]
    return tuple([None if piece.isdecimal() else piece for piece in pieces]), numbers


def joined(template: Template, numbers: Sequence[str]) -> str:
    """The name of a template with these numbers."""
    left = iter(numbers)
    return ".".join([next(left) if each is None else each for each in template])


def _filled(marked: str, numbers: list[str]) -> str:
    for at, number in enumerate(numbers):
        marked = marked.replace(str(_FIRST_MARK + at), number)
    return marked
