"""The parameters of planning, as they are kept with a job: checked before a job is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.errors import InvalidInput
from planner.limits import check_batch_size, check_sequence_length
from planner.names import check_model_name, check_revision, join_revision

_FIELDS = frozenset(
    {
        "options", "batch_size", "sequence_length", "available_nodes", "links", "metadata_repo", "revision", "split",
        "on_node_loss", "paranoid", "kv_bytes_per_token",
    }
)  # fmt: skip
#: Which part of the repository: kept in the revision.
_PART = frozenset({"subfolder", "variant"})


def process_params(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of planning, checked, so that a mistake is refused before a job is made of it.

    Raises:
        InvalidInput: If a field is unknown or wrong.
    """
    from planner.wire.read import cluster_from_json, links_from_json, options_from_json

    unknown = sorted(given.keys() - _FIELDS - _PART)
    if unknown:
        raise InvalidInput(f"process has unknown fields {', '.join(unknown)[:200]}; known: {sorted(_FIELDS | _PART)}")
    params = dict.fromkeys(sorted(_FIELDS)) | {name: value for name, value in given.items() if name in _FIELDS}
    options_from_json(params["options"] or {})
    if params["batch_size"] is not None:
        check_batch_size(params["batch_size"])
    if params["sequence_length"] is not None:
        check_sequence_length(params["sequence_length"])
    nodes, links = params["available_nodes"], params["links"]
    if nodes is not None and not nodes:
        raise InvalidInput("available_nodes is empty: leave it out to use the nodes that are alive")
    if nodes is not None:
        try:
            cluster_from_json({"nodes": list(nodes), **({"links": links} if links else {})})
        except InvalidInput as error:
            # What the reader sent is no file.
            message = str(error).replace("nodes file: nodes", "available_nodes").replace("nodes file: ", "")
            raise InvalidInput(message, details=error.details) from None
    elif links:
        links_from_json(links)
    if params["metadata_repo"] is not None:
        check_model_name(str(params["metadata_repo"]).removeprefix("datasets/"))
    if params["revision"] is not None:
        check_revision(params["revision"])
    params["revision"] = join_revision(params["revision"], **{name: given.get(name) for name in _PART})
    if not isinstance(params["paranoid"], bool | None):
        raise InvalidInput(f"paranoid must be true or false, got {params['paranoid']!r:.40}")
    params["on_node_loss"] = params["on_node_loss"] or "replan"
    if params["on_node_loss"] not in {"replan", "wait"}:
        raise InvalidInput(f"on_node_loss must be 'replan' or 'wait', got {params['on_node_loss']!r:.40}")
    return params
