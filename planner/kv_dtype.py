"""The KV cache at another dtype than the profile's, or as the user states it where the profile does not know it."""

from __future__ import annotations

from dataclasses import replace

from planner import dtypes
from planner.errors import InvalidInput
from planner.profile import KvTerms, Layer, ModelProfile

_FLOATS = frozenset({"F64", "F32", "BF16", "F16"})


def with_kv_dtype(profile: ModelProfile, kv_dtype: str) -> ModelProfile:
    """The profile with its KV cache kept in `kv_dtype`; fixed states are kept in the model's own dtype.

    Args:
        profile: One whose KV cache is counted at the model's dtype.
        kv_dtype: safetensors' or torch's name ("F8_E4M3", "float16").

    Raises:
        InvalidInput: If `kv_dtype` is not known, or the dtype of the cache does not follow from the model's.
    """
    new = dtypes.canonical(kv_dtype)
    new_bits = dtypes.bits(new) if new else None
    if new_bits is None:
        raise InvalidInput(
            f"kv_dtype {kv_dtype[:40]!r} is not known; BF16, F16, F8_E4M3, I8 ... are", details={"field": "kv_dtype"}
        )
    old = dtypes.canonical(profile.dtype or "")
    old_bits = dtypes.bits(old) if old in _FLOATS and old else None
    if old_bits is None:
        raise InvalidInput(
            f"the metadata's dtype is {profile.dtype}, from which the dtype of its KV cache does not follow; "
            "profile the model with that kv_dtype",
            details={"field": "kv_dtype", "dtype": profile.dtype},
        )

    def scaled(layer: Layer) -> Layer:
        terms = layer.kv_terms
        if terms is None:
            return replace(layer, kv_cache_bytes=-(-layer.kv_cache_bytes * new_bits // old_bits))
        told = terms.bytes_at(profile.batch_size, profile.sequence_length)
        terms = KvTerms(
            fixed_bytes=terms.fixed_bytes,
            bytes_per_token=-(-terms.bytes_per_token * new_bits // old_bits),
            window_tokens=terms.window_tokens,
            bytes_per_later_token=-(-terms.bytes_per_later_token * new_bits // old_bits),
        )
        at = terms.bytes_at(profile.batch_size, profile.sequence_length)
        # Where no formula holds, what was counted is more or less than it says.
        at += (layer.kv_cache_bytes - told) * new_bits // old_bits
        return replace(layer, kv_terms=terms, kv_cache_bytes=at)

    return replace(profile, layers=tuple(scaled(layer) for layer in profile.layers))


def with_kv_bytes(profile: ModelProfile, bytes_per_token: int) -> ModelProfile:
    """The profile with the KV cache that a user states for the layers in which it is not known.

    Args:
        profile: One with such layers.
        bytes_per_token: Of all of them together, for each token of each sequence.

    Raises:
        InvalidInput: If the profile knows its whole KV cache, or the bytes are impossible.
    """
    unknown = [layer.name for layer in profile.layers if not layer.kv_known]
    if not unknown:
        raise InvalidInput(
            f"the KV cache of {profile.model_name} is known in all layers; leave kv_bytes_per_token out",
            details={"field": "kv_bytes_per_token"},
        )
    if isinstance(bytes_per_token, bool) or not isinstance(bytes_per_token, int) or not 0 <= bytes_per_token < 2**40:
        raise InvalidInput(
            f"kv_bytes_per_token must be a whole number of bytes from 0, got {bytes_per_token!r:.40}",
            details={"field": "kv_bytes_per_token"},
        )
    each, rest = divmod(bytes_per_token, len(unknown))

    def stated(layer: Layer) -> Layer:
        if layer.kv_known:
            return layer
        terms = KvTerms(bytes_per_token=each + (unknown.index(layer.name) < rest))
        size = terms.bytes_at(profile.batch_size, profile.sequence_length)
        return replace(layer, kv_terms=terms, kv_cache_bytes=size, kv_known=True)

    notes = tuple(note for note in profile.approximate if not note.startswith("KV cache not known"))
    note = f"KV cache of {len(unknown)} layers as stated: {bytes_per_token:,} bytes a token"
    return replace(profile, layers=tuple(map(stated, profile.layers)), approximate=(*notes, note))
