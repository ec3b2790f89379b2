"""How quantisations store one weight of `rows` × `columns`: the tensors of its module, by what follows its name.

    PACKINGS["gptq4"](64, 128)        # {"qweight": ("I32", [16, 64]), "qzeros": ..., ...}

After what the libraries write (their version of early 2026); the numbers of bits are in the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Tensors = dict[str, tuple[str, list[int]]]
Packing = Callable[[int, int], Tensors]


def _up(count: float) -> int:
    return max(1, -int(-count // 1))


def _gptq(bits: int, *, order: bool = True) -> Packing:
    return lambda r, c: {
        "qweight": ("I32", [_up(c * bits / 32), r]),
        "qzeros": ("I32", [_up(c / 128), _up(r * bits / 32)]),
        "scales": ("F16", [_up(c / 128), r]),
        **({"g_idx": ("I32", [c])} if order else {}),
    }


def _bnb4(storage: str = "U8", *, nested: bool = True) -> Packing:
    each = {"U8": 2, "BF16": 4}[storage]
    deep: Tensors = {"weight.nested_absmax": ("F32", [1]), "weight.nested_quant_map": ("F32", [256])}
    return lambda r, c: {
        "weight": (storage, [r * c // each, 1]),
        "weight.absmax": ("U8" if nested else "F32", [_up(r * c / 64)]),
        "weight.quant_map": ("F32", [16]),
        "weight.quant_state.bitsandbytes__nf4": ("U8", [90]),
        **(deep if nested else {}),
    }


def _hqq(bits: int) -> Packing:
    def make(r: int, c: int) -> Tensors:
        groups = _up(r * c / 64)
        packed: tuple[str, list[int]] = ("U8", [_up(64 * bits / 8), groups])
        if bits == 3:
            packed = ("I32", [_up(64 / 10), groups])
        meta: Tensors = {name: ("I32", []) for name in ("nbits", "group_size", "axis", "packing")}
        return {"W_q": packed, "scale": ("BF16", [groups, 1]), "zero": ("BF16", [groups, 1]),
                "shape": ("I32", [2]), **meta}  # fmt: skip

    return make


def _mlx(bits: int, group: int = 64, *, biases: bool = True) -> Packing:
    return lambda r, c: {
        "weight": ("U32", [r, c * bits // 32]),
        "scales": ("BF16" if biases else "U8", [r, _up(c / group)]),
        **({"biases": ("BF16", [r, _up(c / group)])} if biases else {}),
    }


def _aqlm(books: int, bits: int, group: int = 8) -> Packing:
    return lambda r, c: {
        "codes": ("I8" if bits == 8 else "I16", [r, c // group, books]),
        "codebooks": ("F16", [books, 2**bits, 1, group]),
        "scales": ("F16", [r, 1, 1, 1]),
    }


def _plain(dtype: str, **beside: Callable[[int, int], tuple[str, list[int]]]) -> Packing:
    return lambda r, c: {"weight": (dtype, [r, c]), **{name: make(r, c) for name, make in beside.items()}}


def _scalar(r: int, c: int) -> tuple[str, list[int]]:
    return "F32", []


def _row(r: int, c: int) -> tuple[str, list[int]]:
    return "F32", [r, 1]


#: Name -> what a module's weight is stored as.
PACKINGS: Mapping[str, Packing] = {
    "bf16": _plain("BF16"),
    "gptq2": _gptq(2),
    "gptq3": _gptq(3),
    "gptq4": _gptq(4),
    "gptq8": _gptq(8),
    "gptq4-with-bias": lambda r, c: {**_gptq(4)(r, c), "bias": ("F16", [r])},
    "gptq4-marlin": lambda r, c: {"qweight": ("I32", [c // 16, r * 2]), "scales": ("F16", [_up(c / 128), r])},
    "auto-round4": _gptq(4, order=False),
    "awq4-gemm": lambda r, c: {
        "qweight": ("I32", [c, r // 8]),
        "qzeros": ("I32", [_up(c / 128), r // 8]),
        "scales": ("F16", [_up(c / 128), r]),
    },
    "awq4-gemv": lambda r, c: {
        "qweight": ("I32", [r, c // 8]),
        "qzeros": ("I32", [r, _up(c / 1024)]),
        "scales": ("F16", [r, _up(c / 128)]),
    },
    "bnb-nf4": _bnb4(),
    "bnb-nf4-in-bf16": _bnb4("BF16"),
    "bnb-nf4-not-nested": _bnb4(nested=False),
    "bnb-int8": _plain("I8", SCB=lambda r, c: ("F32", [r]), weight_format=lambda r, c: ("U8", [])),
    "fp8-blocks": _plain("F8_E4M3", weight_scale_inv=lambda r, c: ("F32", [_up(r / 128), _up(c / 128)])),
    "fp8-scale": _plain("F8_E4M3", scale=lambda r, c: ("F8_E8M0", [_up(r / 128), _up(c / 128)])),
    "fp8-fbgemm": _plain("F8_E4M3", weight_scale=_row, input_scale_ub=lambda r, c: ("F32", [1])),
    "fp8-static": _plain("F8_E4M3", weight_scale=_scalar, input_scale=_scalar),
    "fp8-mistral": _plain("F8_E4M3", qscale_weight=_scalar, qscale_act=_scalar),
    "fp8-e5m2": _plain("F8_E5M2", weight_scale=_scalar),
    "eetq": _plain("I8", weight_scales=lambda r, c: ("F16", [r])),
    "fp4-in-int8": lambda r, c: {"weight": ("I8", [r, c // 2]), "scale": ("F8_E8M0", [r, _up(c / 32)])},
    "bitnet": lambda r, c: {"weight": ("U8", [r // 4, c]), "weight_scale": ("BF16", [1])},
    "bitnet-autobitlinear": lambda r, c: {"weight": ("BF16", [r, c])},
    # compressed-tensors
    "ct-pack4": lambda r, c: {
        "weight_packed": ("I32", [r, c // 8]),
        "weight_scale": ("BF16", [r, _up(c / 128)]),
        "weight_shape": ("I64", [2]),
    },
    "ct-pack8-zeros": lambda r, c: {
        "weight_packed": ("I32", [r, c // 4]),
        "weight_scale": ("BF16", [r, _up(c / 128)]),
        "weight_zero_point": ("I32", [_up(r / 4), _up(c / 128)]),
        "weight_shape": ("I64", [2]),
        "weight_g_idx": ("I32", [c]),
    },
    "ct-pack3": lambda r, c: {
        "weight_packed": ("I32", [r, _up(c / 10)]),
        "weight_scale": ("BF16", [r, 1]),
        "weight_shape": ("I64", [2]),
    },
    "ct-int8": _plain("I8", weight_scale=_row),
    "ct-float8": _plain("F8_E4M3", weight_scale=_row, input_scale=_scalar),
    "ct-nvfp4": lambda r, c: {
        "weight_packed": ("U8", [r, c // 2]),
        "weight_scale": ("F8_E4M3", [r, c // 16]),
        "weight_global_scale": ("F32", [1]),
        "input_global_scale": ("F32", [1]),
    },
    "ct-mxfp4": lambda r, c: {"weight_packed": ("U8", [r, c // 2]), "weight_scale": ("U8", [r, c // 32])},
    "ct-marlin24": lambda r, c: {
        "weight_packed": ("I32", [c // 32, r * 2]),
        "meta": ("I16", [c // 16, r // 4]),
        "scale_packed": ("F16", [1, r]),
    },
    "ct-sparse24": lambda r, c: {
        "weight.compressed": ("BF16", [r, c // 2]),
        "weight.bitmask": ("U8", [r, c // 8]),
        "weight.shape": ("I64", [2]),
    },
    "ct-sparse24-fp8": lambda r, c: {
        "weight.compressed": ("F8_E4M3", [r, c // 2]),
        "weight.bitmask": ("U8", [r, c // 8]),
        "weight.shape": ("I64", [2]),
        "weight_scale": ("F32", [r, 1]),
    },
    "ct-sparse-bitmask": lambda r, c: {
        "weight.compressed": ("BF16", [r * c // 3]),
        "weight.bitmask": ("U8", [r, c // 8]),
        "weight.row_offsets": ("I64", [r]),
        "weight.shape": ("I64", [2]),
    },
    # NVIDIA ModelOpt, AMD Quark
    "modelopt-nvfp4": lambda r, c: {
        "weight": ("U8", [r, c // 2]),
        "weight_scale": ("F8_E4M3", [r, c // 16]),
        "weight_scale_2": ("F32", []),
        "input_scale": ("F32", []),
    },
    "modelopt-nvfp4-awq": lambda r, c: {**PACKINGS["modelopt-nvfp4"](r, c), "pre_quant_scale": ("BF16", [c])},
    "modelopt-mxfp4": lambda r, c: {"weight": ("U8", [r, c // 2]), "weight_scale": ("U8", [r, c // 32])},
    "modelopt-w4a8": lambda r, c: {
        "weight": ("U8", [r // 2, c]),
        "weight_scale": ("F32", [r, c // 128]),
        "weight_scale_2": ("F32", []),
        "input_scale": ("F32", []),
    },
    "quark-mxfp4": lambda r, c: {"weight": ("U8", [r, c // 2]), "weight_scale": ("U8", [r, c // 32])},
    "quark-int4": lambda r, c: {
        "weight": ("I32", [c, r // 8]),
        "weight_scale": ("BF16", [_up(c / 128), r]),
        "weight_zero_point": ("I32", [_up(c / 128), r // 8]),
    },
    "quark-fp8": _plain("F8_E4M3", weight_scale=_scalar, input_scale=_scalar, output_scale=_scalar),
    # torchao, optimum-quanto, HQQ
    "torchao-int8": lambda r, c: {"_weight_qdata": ("I8", [r, c]), "_weight_scale": ("BF16", [r, 1])},
    "torchao-int4": lambda r, c: {
        "_weight_qdata": ("U8", [r, c // 2]),
        "_weight_scale": ("BF16", [c // 32, r]),
        "_weight_zero_point": ("BF16", [c // 32, r]),
    },
    "torchao-int4-tiles": lambda r, c: {
        "_weight_qdata": ("I32", [r // 8, c // 32, 32, 1]),
        "_weight_scale_and_zero": ("BF16", [c // 32, r, 2]),
    },
    "torchao-float8": lambda r, c: {"_weight_qdata": ("F8_E4M3", [r, c]), "_weight_scale": ("F32", [r, 1])},
    "quanto-int8": lambda r, c: {
        "weight._data": ("I8", [r, c]),
        "weight._scale": ("BF16", [r, 1]),
        "input_scale": ("F32", []),
        "output_scale": ("F32", []),
    },
    "quanto-int4": lambda r, c: {
        "weight._data._data": ("U8", [64, r * c // 128]),
        "weight._scale": ("BF16", [1, r * c // 128]),
        "weight._shift": ("BF16", [1, r * c // 128]),
    },
    "quanto-int2": lambda r, c: {
        "weight._data._data": ("U8", [32, r * c // 128]),
        "weight._scale": ("BF16", [1, r * c // 128]),
        "weight._shift": ("BF16", [1, r * c // 128]),
    },
    "quanto-float8": lambda r, c: {"weight._data": ("F8_E4M3", [r, c]), "weight._scale": ("BF16", [r, 1])},
    "hqq1": _hqq(1),
    "hqq2": _hqq(2),
    "hqq3": _hqq(3),
    "hqq4": _hqq(4),
    "hqq8": _hqq(8),
    # codebooks and trellises
    "aqlm-1x16": _aqlm(1, 16),
    "aqlm-2x8": _aqlm(2, 8),
    "vptq": lambda r, c: {
        "indices": ("I32", [1, r, c // 16]),
        "centroids.weight": ("BF16", [1, 2048]),
        "weight_scale": ("BF16", [c]),
        "weight_bias": ("BF16", [c]),
        "perm": ("I16", [c]),
    },
    "quip-sharp": lambda r, c: {
        "Qidxs": ("I16", [r, c // 8]),
        "SU": ("F16", [c]),
        "SV": ("F16", [r]),
        "codebook_id": ("I64", []),
        "Wscale": ("F32", []),
    },
    "higgs": lambda r, c: {
        "weight": ("I16", [r, c // 4]),
        "scales": ("F16", [r, 1]),
        "tables": ("F16", [256, 2]),
        "tables2": ("F32", [256, 256, 1]),
    },
    "spqr": lambda r, c: {
        "dense_weights": ("I64", [r * c // 16 // 4]),
        "row_offsets": ("I32", [r + 1]),
        "col_vals": ("I32", [r * c // 100]),
        "in_perm": ("I16", [c]),
    },
    "exl2": lambda r, c: {
        "q_weight": ("I32", [c // 8, r]),
        "q_scale": ("I32", [c // 32, r // 8]),
        "q_scale_max": ("F16", [c // 32]),
        "q_groups": ("I16", [c // 16]),
        "q_invperm": ("I32", [c]),
    },
    "exl3": lambda r, c: {
        "trellis": ("I16", [c // 16, r // 16, 16 * 3]),
        "suh": ("F16", [c]),
        "svh": ("F16", [r]),
        "mcg": ("I32", []),
    },
    "marlin": lambda r, c: {"B": ("I32", [c // 16, r * 2]), "s": ("F16", [_up(c / 128), r])},
    "fp-quant": lambda r, c: {
        "qweight": ("U8", [r, c // 2]),
        "scales": ("U8", [r, c // 32]),
        "weight_global_scale": ("F32", [1]),
        "forward_hadamard_matrix": ("BF16", [32, 32]),
    },
    "mlx2": _mlx(2),
    "mlx3": _mlx(3),
    "mlx4": _mlx(4),
    "mlx6": _mlx(6),
    "mlx8": _mlx(8),
    "mlx-mxfp4": _mlx(4, 32, biases=False),
}  # fmt: skip


def _compressed(bits: int) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": bits}}}}


#: Name -> what config.json says of it, where it says something.
STATED: Mapping[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
    "awq": {"quant_method": "awq", "bits": 4},
    "bnb": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8-fbgemm": {"quant_method": "fbgemm_fp8"},
    "fp": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "eetq": {"quant_method": "eetq"},
    "bitnet": {"quant_method": "bitnet"},
    "ct-pack3": _compressed(3),
    "ct-pack8": _compressed(8),
    "ct": _compressed(4),
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "quark": {"quant_method": "quark"},
    "torchao": {"quant_method": "torchao"},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "hqq": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
    "aqlm": {"quant_method": "aqlm", "nbits_per_codebook": 16, "in_group_size": 8, "num_codebooks": 1},
    "exl": {"quant_method": "exl2", "bits": 4.0},
    "spqr": {"quant_method": "spqr", "bits": 3},
    "mlx": {"group_size": 64, "bits": 4},
}


def stated(packing: str) -> dict[str, Any]:
    """What config.json says of the packing's quantisation: nothing if none of `STATED` fits."""
    return next((values for name, values in STATED.items() if packing.startswith(name)), {})
