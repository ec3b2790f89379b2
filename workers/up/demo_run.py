"""The demo's last step: the plan runs over its nodes, and the whole model in this process beside it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.errors import FairshardError
from workers.ledger.steps import ENDED
from workers.network.api_client import Client, run_done
from workers.shards.merge import merge

#: What the model is given.
_TEXT = "The machines of this house are unequal, and together they hold"
_NEW_TOKENS = 12
#: A whole model of more bytes is not loaded for the sake of a demo.
_MOST_BYTES = 4 * 2**30


def run_and_compare(
    client: Client, plan_id: str, folders: Sequence[Path], *, size_bytes: int, pause: Callable[[], None]
) -> dict[str, Any]:
    """Run a plan, and the whole model that its shards make.

    Args:
        client: Of the service.
        plan_id: The plan, whose shards are in `folders`.
        folders: Of all its nodes.
        size_bytes: Of all weights.
        pause: Called while the nodes work.

    Returns:
        `{"what", "largest_difference", "text"?, "timings"}`, or `{"reason"}` where the model is not run.
    """
    if size_bytes > _MOST_BYTES:
        return {"reason": f"a demo loads no whole model of more than {_MOST_BYTES >> 30} GiB"}
    with tempfile.TemporaryDirectory(prefix="fairshard-demo-") as scratch:
        try:
            model, tokenizer = _whole(merge(folders, Path(scratch) / "whole", check=False))
        except Exception as error:  # noqa: BLE001  (a class without code of its own, a missing library, ...)
            return {"reason": f"transformers does not load it: {str(error).splitlines()[0]:.200}"}
        ids = tokenizer(_TEXT)["input_ids"] if tokenizer is not None else list(range(5, 25))
        ids = [token % model.get_input_embeddings().num_embeddings for token in ids]
        try:
            return _compared(client, plan_id, model, ids, pause)
        except FairshardError as error:
            return {"reason": str(error)}


def _whole(folder: Path) -> tuple[Any, Any]:
    import transformers

    from workers.profiling.tracing.skeleton import quiet
    from workers.runtime.weights import silent_bars

    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    with quiet(), silent_bars():
        model = getattr(transformers, architecture).from_pretrained(folder).eval()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)  # nosec B615
        except Exception:  # noqa: BLE001  (without one, any ids do)
            tokenizer = None
    return model, tokenizer


def _compared(client: Client, plan_id: str, model: Any, ids: list[int], pause: Callable[[], None]) -> dict[str, Any]:
    import torch

    given = torch.tensor([ids])
    if model.can_generate() and not model.config.is_encoder_decoder:
        asked = {"token_ids": [ids], "max_new_tokens": _NEW_TOKENS, "logits": True}
        ran = _run(client, plan_id, asked, pause)
        made = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=_NEW_TOKENS,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        pairs = {"logits": (ran["logits"], torch.stack(made.logits, dim=1))}
        what = f"{len(ran['token_ids'][0])} tokens"
    else:
        ran = _run(client, plan_id, {"inputs": {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}}, pause)
        with torch.no_grad():
            output = model(input_ids=given, attention_mask=torch.ones_like(given))
        pairs = {name: (found, output[name]) for name, found in ran["outputs"].items()}
        what = ", ".join(sorted(pairs))
    differences = [float((torch.tensor(ours) - whole.float()).abs().max()) for ours, whole in pairs.values()]
    return {
        "what": what,
        "largest_difference": max(differences),
        **({"text": ran["text"]} if ran.get("text") else {}),
        "timings": ran["timings"],
    }


def _run(client: Client, plan_id: str, asked: Mapping[str, Any], pause: Callable[[], None]) -> dict[str, Any]:
    answer = client.call("POST", f"/api/plans/{plan_id}/runs", asked, headers={"Prefer": "respond-async"})
    while answer["state"] not in ENDED:
        pause()
        answer = client.call("GET", f"/api/runs/{answer['run_id']}")
    return run_done(answer)
