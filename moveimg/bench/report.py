"""Figures of a benchmark as lines for people."""

from __future__ import annotations

from typing import Any

UNITS = {
    "images_per_second": "images a second",
    "codes_per_second": "codes a second",
    "steps_per_second": "steps a second",
    "first_row_seconds": "seconds to the first row",
    "seconds": "seconds",
}


def describe(result: dict[str, Any]) -> str:
    """Medians with their range, the limit, and the share of it that was reached."""
    where, limit = result["machine"], result["limit"]
    lines = [
        f"{result['what']}, {result['images']} images, median of {result['repeats']} (range), on "
        f"{where['name']} ({where['device']}, {where['threads']} threads, torch {where['torch']})"
    ]
    for key, unit in UNITS.items():
        if key in result:
            found = result[key]
            spread = f"({found['min']:,.4g} to {found['max']:,.4g})"
            lines.append(f"{unit:<26}{found['median']:>12,.4g}  {spread}")
    shares = result["share"]
    read = (
        f"{'bandwidth (GB/s)':<26}{limit['bytes_per_second'] / 1e9:>12,.4g}  measured, "
        f"{limit['bytes'] / 1e9:,.4g} GB to read: {shares['bytes']:.0%} of it reached"
    )
    lines += [
        f"{'peak memory (MiB)':<26}{result['peak_memory'] / 2**20:>12,.0f}",
        *([read] if limit["bytes"] else []),
        f"{'matrix rate (GFLOP/s)':<26}{limit['flops_per_second'] / 1e9:>12,.4g}  measured at "
        f"these shapes, {limit['flops'] / 1e9:,.4g} GFLOPs to do: {shares['flops']:.0%} of it",
    ]
    return "\n".join(lines)
