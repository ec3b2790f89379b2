"""The catalogue: names matched whole, figures dense, nothing made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner import devices
from planner.devices import CPU_CORE_FLOP_PER_S, CPU_CORE_MEMORY_BYTES, USABLE_MEMORY, catalogue, lookup, normalised
from planner.errors import InvalidInput
from planner.wire.read import cluster_from_json, node_from_json

GIB = 2**30


def test_there_are_at_least_sixty_devices_and_each_has_a_source() -> None:
    assert len(catalogue()) >= 60
    assert all(len(device.source) >= 15 for device in catalogue())
    assert len({device.name for device in catalogue()}) == len(catalogue())


def test_every_vendor_and_generation_that_is_asked_for_is_there() -> None:
    for name in (
        "Tesla P100-PCIE-16GB", "GeForce GTX 1080 Ti", "Tesla V100-SXM2-16GB", "Tesla T4", "GeForce RTX 3090",
        "NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3", "NVIDIA B200", "NVIDIA GeForce RTX 5090",
        "AMD Instinct MI300X", "AMD Radeon RX 7900 XTX", "Apple M1", "Apple M2", "Apple M3", "Apple M4", "Apple M5",
        "Intel(R) Arc(TM) B580 Graphics", "AMD EPYC 7763 64-Core Processor",
        "Intel(R) Xeon(R) Gold 6148 CPU @ 2.40GHz",
    ):  # fmt: skip
        assert lookup(name).flop_per_s


@pytest.mark.parametrize("device", catalogue(), ids=lambda device: device.name)
def test_figures_are_plausible(device: devices.Device) -> None:
    rates = device.flop_per_s
    assert all(1e11 <= rate <= 1e16 for rate in rates.values())
    # Half the bits never compute slower, and a figure with sparsity would stand out as a factor of two too much.
    for wide, narrow, most in (("fp32", "fp16", 32), ("fp16", "fp8", 2.03), ("tf32", "fp16", 4.01)):
        if wide in rates and narrow in rates:
            assert 0.99 <= rates[narrow] / rates[wide] <= most
    if "bf16" in rates and "fp16" in rates:
        assert rates["bf16"] <= rates["fp16"]
    assert device.memory_bytes is None or 2 * GIB <= device.memory_bytes <= 512 * GIB
    assert device.memory_bytes_per_s is not None
    assert 3e10 <= device.memory_bytes_per_s <= 1e13


@pytest.mark.parametrize(
    ("name", "dtype", "flop_per_s"),
    [
        ("Tesla T4", "F16", 65e12),
        ("Tesla T4", "F32", 8.1e12),
        ("Tesla T4", "BF16", 65e12),  # no bf16 units: such a model runs in fp16
        ("NVIDIA GeForce GTX 1080", "F16", 8.87e12),  # no fast fp16 either
        ("NVIDIA A100-SXM4-80GB", "BF16", 312e12),  # dense, not the 624e12 with sparsity
        ("NVIDIA A100-SXM4-80GB", "torch.float32", 19.5e12),  # torch does not use TF32 unless told
        ("NVIDIA A100-SXM4-80GB", "F8_E4M3", 312e12),  # no fp8 units
        ("NVIDIA H100 80GB HBM3", "float8_e4m3fn", 1979e12),
        ("NVIDIA GeForce RTX 4090", "BF16", 165.2e12),
        ("NVIDIA GeForce RTX 4090", "U8", 165.2e12),  # packed 4-bit weights compute in 16 bits
        ("NVIDIA L4", None, 121e12),
    ],
)
def test_the_rate_is_that_of_the_models_dtype(name: str, dtype: str | None, flop_per_s: float) -> None:
    assert lookup(name).rate(dtype) == pytest.approx(flop_per_s)


def test_a_dtype_without_figures_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no figure for F64"):
        lookup("Tesla T4").rate("F64")
    with pytest.raises(InvalidInput, match="no figure for quaternion"):
        lookup("Tesla T4").rate("quaternion")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100 sxm4 80 GB"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX4090"),
        ("Intel(R) Xeon(R) Gold 6148 CPU @ 2.40GHz", "Intel Xeon Gold 6148"),
        ("AMD EPYC 7763 64-Core Processor", "EPYC 7763"),
        ("Intel® Arc™ A750 Graphics", "intel arc a750"),
    ],
)
def test_one_device_goes_by_several_spellings(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    "name",
    [
        "Quadro T400", "NVIDIA T400 4GB", "T40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 409",
        "NVIDIA GeForce RTX 4090 D", "GeForce RTX 3080 Laptop GPU", "RTX 6000", "NVIDIA L400", "A1000", "P400", "",
        "Apple A10 GPU", "AMD A10", "Intel A10", "Apple A16 GPU", "NVIDIA Radeon RX 7900 XTX", "AMD GeForce RTX 4090",
        "GPU", "NVIDIA", "4090", "RTX 4090 RTX 4090", "M", "Apple M3 Max Pro", "x" * 10_000,
    ],
)  # fmt: skip
def test_what_is_not_in_the_catalogue_is_an_error_that_asks_for_figures(name: str) -> None:
    with pytest.raises(InvalidInput, match="state the node's flop_per_s and memory_bytes") as caught:
        lookup(name)
    assert len(str(caught.value)) < 400


def test_memory_tells_variants_of_one_name_apart() -> None:
    with pytest.raises(InvalidInput, match="the name of several cards") as caught:
        lookup("NVIDIA GeForce RTX 4060 Ti")
    assert len(caught.value.details["variants"]) == 2
    assert lookup("NVIDIA GeForce RTX 4060 Ti", memory_bytes=8_188 * 2**20).name.endswith("8GB")
    assert lookup("NVIDIA GeForce RTX 4060 Ti", memory_bytes=16_380 * 2**20).name.endswith("16GB")
    assert lookup("H100", memory_bytes=95_830 * 2**20).name == "NVIDIA H100 NVL"


def test_names_as_the_drivers_have_them() -> None:
    assert lookup("NVIDIA GH200 144G HBM3e").memory_bytes == 144 * GIB
    # The driver's one name for a die of either card.
    node = node_from_json({"node_id": "a", "device": "AMD Instinct MI250X/MI250"})
    assert (node.flop_per_s, node.memory_bytes) == (181e12, int(64 * GIB * USABLE_MEMORY))
    assert lookup("A10").name == lookup("NVIDIA A10").name == "NVIDIA A10"


def test_a_node_whose_name_fits_several_cards_has_what_the_least_of_them_has() -> None:
    node = node_from_json({"node_id": "a", "device": "NVIDIA A100"})
    assert node.flop_per_s == 312e12
    assert node.memory_bytes == int(40 * GIB * USABLE_MEMORY)
    assert node.memory_bytes_per_s == 1555e9


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # What was measured wins; the catalogue's bandwidth does not belong to another rate.
        (
            {"device": "Tesla T4", "flop_per_s": 4e13, "memory_bytes": 10},
            {"flop_per_s": 4e13, "memory_bytes": 10, "memory_bytes_per_s": None},
        ),
        ({"device": "Tesla T4", "memory_bytes": 10}, {"flop_per_s": 65e12, "memory_bytes_per_s": 320e9}),
        # The williw form.
        (
            {"gpu_available": True, "gpu_name": "Tesla T4", "gpu_usage_percent": 25, "cpu_cores": 8},
            {"flop_per_s": 65e12, "load": 0.25, "available_flop_per_s": 0.75 * 65e12, "device": "Tesla T4"},
        ),
        (
            {"gpu_available": False, "gpu_name": "Tesla T4", "gpu_usage_percent": 90, "cpu_cores": 8},
            {
                "flop_per_s": 8 * CPU_CORE_FLOP_PER_S,
                "memory_bytes": 8 * CPU_CORE_MEMORY_BYTES,
                "load": 0.0,
                "device": "8 CPU cores",
            },
        ),
        ({"cpu_cores": 4}, {"flop_per_s": 4 * CPU_CORE_FLOP_PER_S}),
        # Sixteen of a processor's 64 cores: a quarter of its rate and bandwidth.
        (
            {"device": "AMD EPYC 7763 64-Core Processor", "cpu_cores": 16},
            {
                "flop_per_s": 16 * 32 * 2.45e9,
                "memory_bytes": 16 * CPU_CORE_MEMORY_BYTES,
                "memory_bytes_per_s": 51.2e9,
            },
        ),
        ({"device": "Apple M2 Max", "memory_bytes": 64 * GIB}, {"flop_per_s": 13.6e12, "memory_bytes": 64 * GIB}),
        # A load that is stated wins over the williw form's percentage.
        ({"device": "Tesla T4", "load": 0.5, "gpu_usage_percent": 10}, {"load": 0.5}),
    ],
)
def test_a_node_is_completed_from_the_catalogue(given: dict[str, Any], expected: dict[str, Any]) -> None:
    node = node_from_json({"node_id": "a", **given})
    for name, value in expected.items():
        found = getattr(node, name)
        assert found == (pytest.approx(value) if isinstance(value, float) else value), name


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"gpu_available": True, "cpu_cores": 8}, "nodes[0].gpu_name"),
        ({"gpu_available": True, "gpu_name": "Voodoo 3"}, "nodes[0].gpu_name"),
        ({"device": "Voodoo 3"}, "nodes[0].device"),
        ({"device": "Apple M2 Max"}, "nodes[0].memory_bytes"),
        ({}, "nodes[0].flop_per_s"),
        ({"flop_per_s": 1e12}, "nodes[0].memory_bytes"),
    ],
)
def test_a_node_that_does_not_say_enough_is_refused_at_its_field(given: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        cluster_from_json({"nodes": [{"node_id": "a", **given}]})
    assert [error["path"] for error in caught.value.details["errors"]] == [path]


def test_the_models_dtype_decides_the_rate_of_a_catalogued_node() -> None:
    nodes = [{"node_id": "a", "gpu_available": True, "gpu_name": "NVIDIA H100 80GB HBM3"}]
    assert cluster_from_json(nodes, dtype="F8_E4M3").nodes[0].flop_per_s == 1979e12
    assert cluster_from_json(nodes, dtype="F32").nodes[0].flop_per_s == 67e12
    assert cluster_from_json(nodes).nodes[0].flop_per_s == 989.5e12


def test_the_catalogues_file_has_only_fields_that_are_read() -> None:
    rows = json.loads(Path(devices.__file__).with_name("devices.json").read_bytes())
    known = {"name", "names", "cores", "memory_gib", "memory_gb_per_s", "tflop_per_s", "source"}
    columns = {"fp32", "tf32", "fp16", "bf16", "fp8", "int8"}
    for row in rows:
        assert set(row) <= known
        assert set(row["tflop_per_s"]) <= columns
