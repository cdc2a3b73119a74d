"""Question 8: the seeds' claims beside ours."""

from __future__ import annotations

from pathlib import Path

from sglang.benchmark_metadata.cases import BenchCase
from sglang.srt.layers.attention.nsa.metadata import MetadataMode

from .bench import Bench, Row
from .question import Question, Table, figure, logarithmic, only, save

STEPS = (4, 8)  # speculative steps S; N = S - 1 backends
BS, CONTEXT = 32, 16384
# What the seeds and SGLang's pull request 14781 say: microseconds before and after, ratio, launches.
CLAIMS = {
    "seeds, 4 steps": (700, 235, "3.0x", None),
    "seeds, 8 steps": (1400, 295, "4.8x", None),
    "SGLang #14781": (642, 437, "1.5x", "60 -> 40"),
}
WAYS = {
    "every backend computes its own": ("recompute", "-", "torch"),
    "computed once, copy_ into N (the seeds' scheme)": ("replicate", "torch", "torch"),
    "replicate, fused": ("replicate", "fused", "fused"),
    "replicate, direct": ("replicate", "direct", "fused"),
    "shared": ("shared", "-", "fused"),
}


def cases(quick: bool) -> list[BenchCase]:
    size = (2, 256) if quick else (BS, CONTEXT)
    return [BenchCase(MetadataMode.DECODE, *size, steps - 1) for steps in STEPS]


def measure(bench: Bench) -> list[Row]:
    return [row for row in bench.metadata(cases(bench.quick)) if row["path"] != "floor"]


def _way(rows: list[Row], steps: int, way: str) -> Row:
    path, copy, generator = WAYS[way]
    return only(rows, N=steps - 1, path=path, copy=copy, generator=generator)


def tables(rows: list[Row]) -> list[Table]:
    lines = [[f"claim: {name}", *claim] for name, claim in CLAIMS.items()]
    for steps in STEPS:
        first, *others = WAYS
        before = _way(rows, steps, first)
        for way in others:
            after = _way(rows, steps, way)
            us = (before["completion_us"], after["completion_us"])
            launches = f"{before['launches']:.0f} -> {after['launches']:.0f}"
            lines.append([f"{steps} steps (N = {steps - 1}): {way}", *us, f"{us[0] / us[1]:.1f}x", launches])
    return [Table(["", "before us", "after us", "ratio", "launches"], lines)]


def plot(rows: list[Row], where: str, path: Path) -> None:
    drawn, (axes,) = figure(
        "Metadata of one step group: the seeds' claims and this machine, completion", where
    )
    claimed = [("claimed, every backend", 0, "#999999"), ("claimed, computed once + copy_", 1, "#cccccc")]
    colours = ("#444444", "#b2182b", "#2166ac", "#053061", "#1a9850")
    for group, steps in enumerate(STEPS):
        values = [(name, CLAIMS[f"seeds, {steps} steps"][i], colour) for name, i, colour in claimed]
        values += [
            (way, _way(rows, steps, way)["completion_us"], colour) for way, colour in zip(WAYS, colours)
        ]
        for i, (name, us, colour) in enumerate(values):
            x = group * (len(values) + 1) + i
            axes.bar(x, us, color=colour, width=0.9, label=name if group == 0 else None)
            axes.text(x, us, f"{us:.0f}", ha="center", va="bottom", fontsize=8)
    logarithmic(axes)
    axes.set_xticks(
        [3 + 8 * i for i in range(len(STEPS))], [f"{steps} steps, N = {steps - 1}" for steps in STEPS]
    )
    axes.set_ylabel("us (median)")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    drawn.set_size_inches(10, 4.6)
    save(drawn, path)


QUESTION = Question("claims", "The seeds' claims side by side with ours", measure, tables, plot)
