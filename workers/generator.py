"""Profiles a checkpoint: what each layer costs, from the headers and the config alone (docs/profiling.md).

Parameters, bytes, ties and layers come from the headers. FLOP, KV cache and activations come from a trace of the
model without weights (`workers.profiling.tracing.tracer`, cached on disk) and are exact; or from the general rule of
`workers.profiling.rules`, and then the profile says so in `approximate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from planner.dtypes import canonical
from planner.errors import InvalidInput
from planner.limits import check_batch_size, check_sequence_length
from planner.profile import ModelProfile, outside
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.shared_storage import with_twins
from workers.profiling.contents import Contents, read_contents
from workers.profiling.from_headers import general_layers
from workers.profiling.later_modules import with_modules
from workers.progress import Progress, silent

if TYPE_CHECKING:
    from workers.profiling.trace import ModelTrace


def generate(
    checkpoint: Checkpoint,
    *,
    batch_size: int = 1,
    sequence_length: int = 512,
    compute: bool = True,
    kv_dtype: str | None = None,
    node_id: str | None = None,
    cache_dir: Path | None = None,
    lean: bool = False,
    progress: Progress = silent,
) -> ModelProfile:
    """Profile a checkpoint without loading its weights.

    Args:
        checkpoint: A folder or a Hub repository, as `workers.downloader.resolve` makes it.
        batch_size: Sequences in the pass that is counted.
        sequence_length: Tokens in each.
        compute: Count FLOP exactly, which loads torch unless `cache_dir` holds the trace; False: the general rule.
        kv_dtype: Dtype of the cached keys and values; default the model's.
        node_id: The node that makes it, for the record.
        cache_dir: Where traces are kept; None: traced anew.
        lean: Make the first trace in half the time; for processes that neither compile nor distribute models
            (`workers.profiling.tracing.lean_imports`).
        progress: Told of the headers read.

    Raises:
        InvalidCheckpoint: If headers or config are not valid, or contradict each other.
        InvalidInput: If the batch size, sequence length or `kv_dtype` is impossible.
        Unavailable: If the server cannot be reached.
    """
    check_batch_size(batch_size)
    check_sequence_length(sequence_length)
    if kv_dtype is not None and canonical(kv_dtype) is None:
        raise InvalidInput(f"kv_dtype {kv_dtype[:40]!r} is not known; bfloat16, float16, float8_e4m3fn ... are")
    contents = read_contents(checkpoint, progress=progress)
    trace, reasons, known, missing = (
        _trace(contents, cache_dir, batch_size, sequence_length, lean=lean) if compute else (None, [], {}, None)
    )
    if trace is None:
        layers, approximate = general_layers(contents, kv_dtype=kv_dtype, known=known)
        layers = [
            layer.at(batch_size=batch_size, sequence_length=sequence_length, from_batch=1, from_sequence=1)
            for layer in layers
        ]
        approximate += reasons
    else:
        from workers.profiling.from_trace import exact_layers

        layers = exact_layers(
            contents, trace, batch_size=batch_size, sequence_length=sequence_length, kv_dtype=kv_dtype
        )
        length = min(sequence_length, trace.longest or sequence_length)
        approximate = [*trace.reasons, *outside(layers, length, batched=False)]
    layers = with_twins(layers, contents.headers.twins)
    longest = None if trace is None else trace.longest
    layers, later = with_modules(
        layers,
        contents.headers.modules,
        batch_size=batch_size,
        length=min(sequence_length, longest or sequence_length),
    )
    approximate += later
    return ModelProfile(
        model_name=checkpoint.model_name,
        revision=checkpoint.revision,
        model_type=contents.config.model_type,
        architecture=contents.config.architecture,
        dtype=contents.dtype,
        batch_size=batch_size,
        sequence_length=sequence_length,
        layers=tuple(layers),
        approximate=tuple(approximate),
        missing_tensors=missing,
        longest_sequence=longest,
        generated_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        node_id=node_id,
    )


def _trace(
    contents: Contents, cache_dir: Path | None, batch_size: int, sequence_length: int, *, lean: bool
) -> tuple[ModelTrace | None, list[str], Mapping[str, int], tuple[str, ...] | None]:
    """The model's trace, from the cache or made now; or None, the reasons, and the tensors' parameters.

    And the tensors that the checkpoint lacks; None: not known.

    Raises:
        InvalidCheckpoint: If the checkpoint's tensors are not those of its config's model.
    """
    from workers.profiling.trace_cache import TraceCache

    tensors = {tensor.name: tensor for tensor in contents.headers.tensors}
    twins = {tensor.name: tensor for tensor in contents.headers.twins}
    cache = TraceCache(cache_dir, contents.config, tensors | twins)
    cached = cache.read()
    if cached is not None and cached.covers(batch_size, sequence_length):
        return cached, [], {}, cached.missing
    try:
        if lean:
            from workers.profiling.tracing.lean_imports import start_lean

            start_lean()
        from workers.profiling.tracing.skeleton import NotTraceable
        from workers.profiling.tracing.tracer import trace
    except ModuleNotFoundError as error:
        return None, [f"torch and transformers are not installed: {error.name} is missing"], {}, None
    except ImportError as error:
        return None, [f"the installed torch and transformers cannot be used: {error}"[:300]], {}, None
    try:
        made = trace(
            contents.config, tensors, twins=tuple(twins), batch_size=batch_size, sequence_length=sequence_length
        )
    except NotTraceable as error:
        return None, [str(error)], error.known, error.missing
    return cache.write(made, cached), [], {}, made.missing
