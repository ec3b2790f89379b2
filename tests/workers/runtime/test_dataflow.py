"""What a trace finds: which results reach which calls, through whatever lies between them."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers.profiling.tracing.module_tree import find_units
from workers.runtime.dataflow import Trace, plan_visit, trace


class Model(nn.Module):
    """A stack of three, an embedding and a head, with `between` run on the hidden states before each layer."""

    def __init__(self, between: Callable[[Model, list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.zeros(4))
        self.head = nn.Linear(4, 8)
        self.between = between

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        states = [self.embed(ids)]
        for layer in self.layers:
            states.append(layer(self.between(self, states)))
        return {"logits": self.head(self.norm(self.between(self, states)))}


def traced(between: Callable[[Model, list[Tensor]], Tensor]) -> Trace:
    with torch.device("meta"):
        model = Model(between)
    return trace(model, find_units(model, ()), {"ids": torch.ones(2, 3, dtype=torch.long)})


def needs(found: Trace) -> dict[str, set[str]]:
    return {call.path: set(call.needs) for call in found.calls}


def last(model: Model, states: list[Tensor]) -> Tensor:
    return states[-1]


def test_a_plain_chain_needs_the_layer_before() -> None:
    found = traced(last)
    assert needs(found) == {
        "embed": set(),
        "layers.0": {"embed#0:0"},
        "layers.1": {"layers.0#0:0"},
        "layers.2": {"layers.1#0:0"},
        "norm": {"layers.2#0:0"},
        "head": {"norm#0:0"},
    }
    assert found.output_needs == {"head#0:0"}
    assert [tuple(call.parts[0].shape) for call in found.calls[:2]] == [(2, 3, 4), (2, 3, 4)]


def stream(model: Model, states: list[Tensor]) -> Tensor:
    return torch.stack(states).mean(0)


def written_in_place(model: Model, states: list[Tensor]) -> Tensor:
    made = torch.zeros_like(states[0])
    for state in states:
        made[:, 0] += state[:, 0]
    return made.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("between", [stream, written_in_place])
def test_what_is_mixed_or_written_in_place_is_followed(between: Any) -> None:
    found = needs(traced(between))
    assert found["layers.0"] == {"embed#0:0"}
    assert found["layers.2"] == {"embed#0:0", "layers.0#0:0", "layers.1#0:0"}
    assert found["norm"] == {"embed#0:0", "layers.0#0:0", "layers.1#0:0", "layers.2#0:0"}


def scaled(model: Model, states: list[Tensor]) -> Tensor:
    shift = model.shift
    assert isinstance(shift, Tensor)
    return states[-1] * model.scale + shift


def test_weights_and_buffers_between_are_named() -> None:
    found = traced(scaled)
    assert needs(found)["layers.1"] == {"layers.0#0:0", "=scale", "~shift"}
    # Who holds the weight hands it on to those who do not; a buffer that nobody brought is made by each.
    visit = plan_visit(found, (), lambda key: key in {"embed", "layers.0", "=scale"})
    assert visit.compute == (("embed", 0), ("layers.0", 0))
    assert visit.hand_on == {"layers.0#0:0", "=scale"}
    assert visit.next_module == "layers.1"
    visit = plan_visit(found, visit.hand_on, lambda key: key in {"layers.1", "layers.2", "norm", "head"})
    assert visit.next_module is None
    visit = plan_visit(found, {"layers.0#0:0"}, lambda key: key in {"layers.1", "layers.2", "norm", "head"})
    assert (visit.compute, visit.next_module) == ((), "layers.1"), "without the weight nothing can run"


def detached(model: Model, states: list[Tensor]) -> Tensor:
    # The first state counts only for its shape: nothing of it has to be handed on.
    return states[-1] + torch.zeros(states[0].shape, device=states[0].device)


def test_a_shape_is_no_need() -> None:
    assert needs(traced(detached))["norm"] == {"layers.2#0:0"}


def test_only_what_is_still_needed_is_handed_on_and_run() -> None:
    found = traced(stream)
    visit = plan_visit(found, (), lambda key: key in {"embed", "layers.0", "layers.2", "head"})
    assert visit.compute == (("embed", 0), ("layers.0", 0))
    assert visit.hand_on == {"embed#0:0", "layers.0#0:0"}
    visit = plan_visit(found, visit.hand_on, lambda key: key == "layers.1")
    assert visit.hand_on == {"embed#0:0", "layers.0#0:0", "layers.1#0:0"}
    # A node with a copy of the embedding does not run it again.
    visit = plan_visit(found, visit.hand_on, lambda key: key in {"embed", "layers.2", "norm", "head"})
    assert visit.compute == (("layers.2", 0), ("norm", 0), ("head", 0))
    assert (visit.hand_on, visit.next_module) == (frozenset(), None)


def test_units_are_layers_of_stacks_and_what_lies_beside_them() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.ModuleDict({"word": nn.Embedding(2, 2), "norm": nn.LayerNorm(2)})
            self.encoder = nn.Module()
            block = nn.Module()
            block.inner = nn.ModuleList([nn.Linear(2, 2)])
            self.encoder.layer = nn.ModuleList([block, nn.Identity(), nn.Linear(2, 2)])
            self.drop = nn.Dropout()

    assert find_units(Nested(), ()) == ("embeddings", "encoder.layer.0", "encoder.layer.2")
    # A plan that divides the embeddings divides the unit; layers of a stack stay whole.
    assert find_units(Nested(), ("embeddings.word", "encoder.layer.0.inner")) == (
        "embeddings.word",
        "embeddings.norm",
        "encoder.layer.0",
        "encoder.layer.2",
    )


def test_what_asks_for_values_cannot_be_traced_but_truth_is_assumed() -> None:
    def asks(model: Model, states: list[Tensor]) -> Tensor:
        return states[-1] if bool((states[-1] > 0).all()) else states[0]

    assert needs(traced(asks))["layers.1"] == {"layers.0#0:0"}

    def counts(model: Model, states: list[Tensor]) -> Tensor:
        return states[-1][: int((states[-1] > 0).sum())]

    with pytest.raises(RuntimeError):
        traced(counts)


class Keeper(nn.Linear):
    """Shares something with later layers, in a mapping or by writing to a tensor."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def forward(self, x: Tensor, shared: Any) -> Tensor:  # type: ignore[override]
        if isinstance(shared, Tensor):
            shared += x
            return super().forward(x) + shared
        if "keys" not in shared:
            shared["keys"] = x * 2
        shared_keys: Tensor = shared["keys"]
        return super().forward(x) + shared_keys


class Keepers(nn.Module):
    def __init__(self, share: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Keeper(), Keeper(), Keeper()])
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        shared = self.share(x)
        for layer in self.layers:
            x = x + layer(x, shared)
        return x


@pytest.mark.parametrize("share", [lambda _: {}, lambda _: UserDict()])
def test_what_layers_share_in_a_mapping_is_part_of_their_results(share: Any) -> None:
    with torch.device("meta"):
        model = Keepers(share)
    found = trace(model, find_units(model, ()), {"x": torch.ones(1, 2)})
    assert needs(found) == {
        "layers.0": set(),
        "layers.1": {"layers.0#0:0", "layers.0#0:1"},
        "layers.2": {"layers.0#0:0", "layers.0#0:1", "layers.1#0:0"},
    }


def test_what_is_written_into_a_shared_tensor_is_refused() -> None:
    with torch.device("meta"):
        model = Keepers(torch.zeros_like)
    with pytest.raises(NotImplementedError, match=r"layers\.0 writes to its arguments"):
        trace(model, find_units(model, ()), {"x": torch.ones(1, 2)})
