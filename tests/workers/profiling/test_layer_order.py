"""Layers that a pass runs at two times are divided; those that it runs at one stay as their names have them."""

from __future__ import annotations

import pytest

from workers.profiling.layer_names import group_names
from workers.profiling.layer_order import idle_last, in_running_order


def ordered(sizes: dict[str, int], *ran: str) -> list[tuple[str, str, list[str]]]:
    """(name, type, members) of the layers of a model whose modules ran in this order."""
    found = in_running_order(group_names(sizes), ran, sizes)
    return [
        (group.name, group.layer_type, [name for name, its in found.of.items() if its == at])
        for at, group in enumerate(found.groups)
    ]


STACK = {"m.layers.0.mlp.weight": 4, "m.layers.1.mlp.weight": 4}


def test_what_runs_as_its_names_say_stays() -> None:
    sizes = {"m.embed.weight": 9, **STACK, "m.norm.weight": 1, "head.weight": 9}
    grouping = group_names(sizes)
    assert in_running_order(grouping, ["m.embed", "m.layers.0", "m.layers.1", "m.norm", "head"], sizes) is grouping
    # Tied: the embedding runs again as the head's neighbour would, which its first run decides.
    assert in_running_order(grouping, ["m.embed", "m.layers.0", "m.layers.1"], sizes) is grouping


@pytest.mark.parametrize("norm", ["m.embedding_norm", "m.norm_of_emb"])
def test_a_last_norm_named_after_the_embedding_runs_with_the_head(norm: str) -> None:
    sizes = {"m.embed.weight": 9, **STACK, f"{norm}.weight": 1, "head.weight": 9}
    found = ordered(sizes, "m.embed", "m.layers.0", "m.layers.1", norm, "head")
    assert found[0] == ("m.embed", "embedding", ["m.embed.weight"])
    assert found[-1] == ("head", "head", [f"{norm}.weight", "head.weight"])


def test_a_projection_of_the_embeddings_runs_with_them() -> None:
    sizes = {"m.embed.weight": 9, **STACK, "m.input_projection.weight": 99, "m.norm.weight": 1, "head.weight": 5}
    assert group_names(sizes).of["m.input_projection.weight"] == 3, "by its name it is the head's"
    found = ordered(sizes, "m.embed", "m.input_projection", "m.layers.0", "m.layers.1", "m.norm", "head")
    assert found[0][2] == ["m.embed.weight", "m.input_projection.weight"]
    assert found[-1] == ("head", "head", ["m.norm.weight", "head.weight"]), "named by what is left in it"


def test_what_runs_between_numbered_layers_is_a_layer_of_its_own() -> None:
    sizes = {"m.embed.weight": 9, **STACK, "m.norm_between.weight": 2, "head.weight": 9}
    found = ordered(sizes, "m.embed", "m.layers.0", "m.norm_between", "m.layers.1", "head")
    assert [name for name, _, _ in found] == ["m.embed", "m.layers.0", "m.norm_between", "m.layers.1", "head"]
    assert found[2][1] == "norm"


def test_layers_that_a_pass_does_not_run_come_last() -> None:
    assert idle_last([3, 0, 4], {1, 2}, 6) == [3, 0, 4, 5, 1, 2]
    assert idle_last([1], (), 3) == [0, 1, 2]
