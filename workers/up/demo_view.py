"""How the demo shows a plan, shards and their verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workers.shards.manifest import read_manifest
from workers.shards.verify import VerifyReport


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print the plan as a table."""
    metadata, predicted = plan["metadata"], plan["predicted"]
    bound = "bound of an approximate profile" if plan["approximate"] else "proven bound"
    print(f"\nPlan {plan['plan_id']} of {plan['model_name']}, revision {str(plan['revision'])[:12]}")
    print(
        f"  {metadata['total_layers']} layers, {metadata['total_compute'] / 1e9:,.2f} GFLOP a pass; strategy "
        f"{plan['strategy']}: slowest node {predicted['bottleneck_s'] * 1e3:,.2f} ms, "
        f"{predicted['gap']:.2%} above the {bound}"
    )
    rows = [("NODE", "LAYERS", "GFLOP", "BUDGET USED", "MEMORY", "HOLDS")]
    memory = {node["node_id"]: node.get("memory_used_bytes", 0) for node in plan["nodes"]}
    for node_id, part in plan["split_plan"].items():
        rows.append(
            (
                node_id,
                str(len(part["layer_names"])),
                f"{part['total_compute'] / 1e9:,.2f}",
                f"{part['compute_utilization']:.1%}",
                f"{memory[node_id] / 1e6:,.1f} MB",
                _holds(part["layer_names"]),
            )
        )
    _table(rows)
    chain = " -> ".join(hop["node_id"] for hop in plan["megaphone_plan"]["chain"])
    print(f"  megaphone: {chain}")


def _holds(names: list[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_shards(folders: Sequence[Path]) -> None:
    """Print the files of each shard with their bytes and digests."""
    rows = [("NODE", "FILE", "BYTES", "DIGEST")]
    for manifest in map(read_manifest, folders):
        rows += [
            (manifest.node_id, file.name, f"{file.size_bytes:,}", file.digest or "(linked whole, read by verify)")
            for file in manifest.files
        ]
    print("\nShards")
    _table(rows)
    for folder in folders:
        print(f"  {folder}")


def show_report(report: VerifyReport) -> bool:
    """Print what the verification found; whether the shards are the checkpoint, whole."""
    print(
        f"\nVerified: {report.tensors} tensors in {report.files} files of {report.shards} shards, {report.bytes:,} "
        "bytes read and compared with the checkpoint"
    )
    for name, sha256 in report.rebuilt.items():
        proof = "equal to the checkpoint's file" if name in report.proven else "NOT PROVEN"
        print(f"  put together again: {name}  sha256:{sha256}  {proof}")
    for problem in report.problems:
        print(f"  WRONG: {problem.directory}: {problem.what}: {problem.reason}")
    if report.missing_nodes:
        print(f"  MISSING: {', '.join(report.missing_nodes)}")
    print(f"  {'complete and bit-identical' if report.complete else 'FAILED'}")
    return report.complete
