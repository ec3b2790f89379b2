"""What attention masks hide: `compute_min` against the attention weights of real runs on the CPU."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from support.models.families import families, folder_of, load, real_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from planner.profile import MaskTerms
from workers.checkpoint.folder import open_folder
from workers.generator import generate
from workers.profiling.layer_parts import part_of
from workers.profiling.tracing.inputs import make_inputs
from workers.profiling.tracing.masks import Sight, sight_of
from workers.profiling.tracing.skeleton import quiet

#: No other dimension of these models is as large as the sequence, so that a square of it is a matrix of pairs.
BATCH, LENGTH = 2, 41
#: No attention among them, or of no plain pairs, or under a name that recurrences have too (so that nothing counts as
#: hidden), or inputs that no shape tells.
_LEFT_OUT = {"llava", "qwen2_5_vl", "mamba", "mamba2", "vit", "deepseek_v4", "recurrent_gemma"}


class _Pairs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes, for each module, the pairs with a weight above zero, and the FLOP spent on pairs."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = length
        self.inside = [""]
        self.seen: dict[str, set[int]] = defaultdict(set)
        self.flop: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        square = (self.length, self.length)
        if "softmax" in str(func) and out.ndim == 4 and self.length <= out.shape[-1] <= self.length + 1:
            # A sink, where there is one, is one more column.
            weights = out[..., : self.length]
            self.seen[self.inside[-1]].update(int(count) for count in (weights > 0).sum((-2, -1)).flatten())
        rule = flop_registry.get(func._overloadpacket)
        # Products of batches of matrices only: a weight of a model as wide as the sequence is square, too.
        if (
            rule is not None
            and "bmm" in str(func)
            and any(t.shape[-2:] == square for t in (out, *args) if isinstance(t, torch.Tensor))
        ):
            self.flop[self.inside[-1]] += rule(*args, **(kwargs or {}), out_val=out)
        return out


def real_pairs(name: str, length: int) -> _Pairs:
    with quiet():
        model = load(name)
        inputs = real_inputs(make_inputs(model, BATCH, length))
        tokens = inputs["decoder_input_ids"] if "decoder_input_ids" in inputs else inputs["input_ids"]
        pairs = _Pairs(tokens.shape[1])
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, path=path: pairs.inside.append(path))
            module.register_forward_hook(lambda *_: pairs.inside.pop() and None)
        with torch.no_grad(), pairs:
            model(**inputs)
    return pairs


@pytest.mark.parametrize("name", families(without=_LEFT_OUT))
def test_the_least_compute_is_that_of_the_pairs_with_weight(name: str) -> None:
    profile = generate(open_folder(folder_of(name)), batch_size=BATCH, sequence_length=LENGTH)
    length = min(LENGTH, profile.longest_sequence or LENGTH)
    real = real_pairs(name, LENGTH)
    compared = 0
    for layer in profile.layers:
        mine = {path: counts for path, counts in real.seen.items() if path.startswith(f"{layer.name}.")}
        attention = {p: c for p, c in mine.items() if part_of(p[len(layer.name) + 1 :], "decoder") == "attention"}
        if not layer.name.rpartition(".")[2].isdecimal() or not attention:
            continue
        (counts,) = attention.values()
        (seen,) = counts  # of every head and sequence
        assert layer.compute_min is not None
        hidden = layer.compute_required - layer.compute_min
        (path,) = attention
        assert hidden * length**2 == sum(
            flop * (length**2 - seen) for where, flop in real.flop.items() if f"{where}.".startswith(f"{path}.")
        ), layer.name
        assert seen == (layer.mask_terms.seen_pairs(length) if layer.mask_terms else length**2)
        compared += 1
    assert compared >= 1


@pytest.mark.parametrize(
    ("mask", "sight"),
    [
        (causal_mask_function, Sight(None, 0)),
        (bidirectional_mask_function, Sight(None, None)),
        (sliding_window_causal_mask_function(512), Sight(511, 0)),
        (sliding_window_causal_mask_function(1), Sight(0, 0)),
        (sliding_window_bidirectional_mask_function(64), Sight(64, 64)),
        (sliding_window_causal_mask_function(1_000_003), Sight(1_000_002, 0)),
        (chunked_causal_mask_function(8192, torch.zeros(2, dtype=torch.long, device="meta")), Sight(None, 0, 8192)),
        (chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long, device="meta")), Sight(None, 0, 3)),
        (or_masks(causal_mask_function, sliding_window_bidirectional_mask_function(5)), Sight(None, 5)),
        # A token that does not even see itself is no mask that these terms describe.
        (and_masks(causal_mask_function, lambda batch, head, query, key: query != key), None),
        (lambda batch, head, query, key: query.no_such_thing, None),
    ],
)
def test_a_mask_function_tells_what_it_lets_see(mask: Any, sight: Sight | None) -> None:
    assert sight_of(mask) == sight


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 40])
@pytest.mark.parametrize(("behind", "ahead", "chunk"), [
    (None, 0, None), (None, None, None), (3, 0, None), (0, 0, None), (4, 2, None), (None, 0, 8), (None, None, 5),
    (2, 0, 5),
])  # fmt: skip
def test_pairs_are_counted_as_one_by_one(
    length: int, behind: int | None, ahead: int | None, chunk: int | None
) -> None:
    terms = MaskTerms(flop_per_pair=1, behind_tokens=behind, ahead_tokens=ahead, chunk_tokens=chunk)
    pairs = [
        (query, key)
        for query in range(length)
        for key in range(length)
        if (behind is None or query - key <= behind)
        and (ahead is None or key - query <= ahead)
        and (chunk is None or query // chunk == key // chunk)
    ]
    assert terms.seen_pairs(length) == len(pairs)
    assert terms.hidden_flop(3, length) == 3 * (length**2 - len(pairs))
