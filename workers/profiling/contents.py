"""What was read of a checkpoint, config and headers: all that a profile is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.dtypes import canonical
from planner.profile import Layer, Tensor, summed
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.config import ModelConfig, read_config
from workers.checkpoint.headers import Headers, read_headers
from workers.profiling.quantization import about, stored_counts
from workers.progress import Progress, silent

#: Names of the buffers that checkpoints carry; they cost bytes and are no parameters.
_BUFFERS = (
    ".inv_freq", "position_ids", "token_type_ids", ".masked_bias", "num_batches_tracked", "running_mean",
    "running_var", ".attn.bias", ".attention.bias", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached",
    "final_logits_bias", "relative_position_index", ".layer_scalar", ".slope_rate", ".query_decay", ".key_decay",
    ".diagonal_decay", "lerope.alpha", ".act_fn.beta", ".act_fn.eps", ".weight_integer", ".bias_integer",
    ".weight_scaling_factor", ".fc_scaling_factor", ".act_scaling_factor", ".LayerNorm.shift", ".x_min", ".x_max",
    ".input_min", ".input_max", ".output_min", ".output_max", ".codebook.inited", ".codebook.initialized",
    ".codebook.cluster_size", ".codebook.cluster_usage", ".codebook.embed", ".codebook.embed_avg",
    ".codebook.embed_sum", ".n_points_scale", ".num_points_scale", ".global_mean", ".global_invstd", ".norm_mean",
    ".norm_std", ".pos_idx_to_embed", ".balancing_biases",
)  # fmt: skip
#: Terms that balance a router's experts: buffers in most architectures, parameters in some; some call them gate.bias.
_BALANCES = ("e_score_correction_bias", ".expert_bias")
_BALANCES_OF: Mapping[str | None, tuple[str, ...]] = {
    **dict.fromkeys(("deepseek_v4", "inkling2", "inkling2_text", "inkling_mm_model"), (*_BALANCES, ".gate.bias")),
    **dict.fromkeys(("ernie4_5_moe", "ernie4_5_vl_moe", "laguna", "afmoe"), ()),
}
NOTHING: Mapping[str, int] = {}
#: Integers that pack nothing.
_WHOLE_NUMBERS = {"I64", "U64", "BOOL"}
_FLOATS = {"F32", "F16", "BF16", "F64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What was read of a checkpoint: all that a profile is made of."""

    config: ModelConfig
    headers: Headers
    #: Tensor -> values that it holds, as far as names and shapes tell with certainty; else None.
    counts: Mapping[str, int | None]
    #: Most common dtype of the weights by bytes.
    dtype: str

    def parameters(self, tensor: Tensor, known: Mapping[str, int] = NOTHING) -> int | None:
        """Parameters that a stored tensor holds, none if it is a buffer; None where that is not certain.

        Args:
            tensor: Of this checkpoint.
            known: Tensor -> its parameters, where the model's modules told; for others names and shapes decide.
        """
        name, count = tensor.name, self.counts[tensor.name]
        if name in known:
            return known[name]
        if name.endswith("weight"):
            is_buffer = len(tensor.shape) == 1 and self._frozen(name)
        else:
            is_buffer = (
                name.endswith(_BUFFERS + _BALANCES_OF.get(self.config.model_type, _BALANCES))
                or (tensor.dtype in _WHOLE_NUMBERS and count is not None)
                or self._frozen(name)
            )
        return 0 if is_buffer else count

    def about(self, tensor: Tensor, known: Mapping[str, int] = NOTHING) -> int:
        """Likewise, with an estimate where it is not certain."""
        count = self.parameters(tensor, known)
        return about(tensor, self.config.quantization) if count is None else count

    @property
    def float_dtype(self) -> str:
        """The dtype that the model computes and caches in: the config's, else the most common plain floating one."""
        for name in ("dtype", "torch_dtype"):
            given = self.config.text.get(name) or self.config.values.get(name)
            found = canonical(given) if isinstance(given, str) else None
            if found in _FLOATS:
                return found
        if self.dtype in _FLOATS:
            return self.dtype
        return "BF16" if any(tensor.dtype == "BF16" for tensor in self.headers.tensors) else "F16"

    def unused_layer(self, tensors: Sequence[Tensor], index: int) -> Layer:
        """The last entry of a profile: the tensors that no layer uses."""
        return Layer(
            name="unused",
            index=index,
            layer_type="unused",
            num_params=summed(self.parameters(tensor) for tensor in tensors),
            weight_bytes=sum(tensor.size_bytes for tensor in tensors),
            tensors=tuple(tensors),
        )

    def _frozen(self, name: str) -> bool:
        """Whether it is a frozen batch norm's weight or bias: a trained one also stores `num_batches_tracked`."""
        module, _, kind = name.rpartition(".")
        return (
            kind in {"weight", "bias"}
            and f"{module}.running_var" in self.counts
            and f"{module}.num_batches_tracked" not in self.counts
        )


def read_contents(checkpoint: Checkpoint, *, progress: Progress = silent) -> Contents:
    """Read a checkpoint's config and headers; no torch, numpy or Hub client is loaded for a folder.

    Raises:
        InvalidCheckpoint: If they are not valid.
        Unavailable: If the server cannot be reached.
    """
    config = read_config(checkpoint)
    headers = read_headers(checkpoint, config=config, progress=progress)
    sizes: Counter[str] = Counter()
    for tensor in headers.tensors:
        sizes[tensor.dtype] += tensor.end - tensor.begin
    dtype = min(sizes, key=lambda name: (-sizes[name], name))
    return Contents(
        config=config, headers=headers, counts=stored_counts(headers.tensors, config.quantization), dtype=dtype
    )
