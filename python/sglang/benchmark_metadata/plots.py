"""Three pictures of a result: cost against N, one case in bars, and memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

Result = dict[str, Any]

# What every picture shows, in this order: name, path, copy, generator, colour.
SERIES: tuple[tuple[str, str, str, str, str], ...] = (
    ("per-backend computation", "recompute", "-", "torch", "#444444"),
    ("torch precompute, copy_ to N", "replicate", "torch", "torch", "#b2182b"),
    ("one generation, copy_ to N", "replicate", "torch", "fused", "#ef8a62"),
    ("foreach", "replicate", "foreach", "fused", "#fdae61"),
    ("CUDA streams", "replicate", "streams", "fused", "#c2a5cf"),
    ("cat", "replicate", "cat", "fused", "#9970ab"),
    ("Triton, one launch", "replicate", "triton", "fused", "#80b1d3"),
    ("fused, N launches", "replicate", "fused_n", "fused", "#67a9cf"),
    ("replicate, fused for N", "replicate", "fused", "fused", "#2166ac"),
    ("replicate, generated into N", "replicate", "direct", "fused", "#053061"),
    ("shared", "shared", "-", "fused", "#1a9850"),
    ("in_graph", "in_graph", "-", "fused", "#66bd63"),
    ("indirect", "indirect", "-", "fused", "#b8860b"),
)


def plot_all(results: list[Result], folder: Path) -> list[Path]:
    """Writes the PNG files for the case nearest to DECODE, 32 requests, 16k. Raises where there is none."""
    decode = [r for r in results if r["mode"] == "DECODE" and r["completion_us"] and not r["skipped"]]
    if not decode:
        raise ValueError("no DECODE measurement to plot")
    bs = _nearest({r["bs"] for r in decode}, 32)
    context = _nearest({r["context"] for r in decode if r["bs"] == bs}, 16384)
    case = [r for r in decode if (r["bs"], r["context"]) == (bs, context)]
    folder.mkdir(parents=True, exist_ok=True)
    where = f"{case[0]['device']}, DECODE, {bs} requests, context {context}, page {case[0]['page_size']}"
    n = _nearest({r["N"] for r in case}, 7)
    return [
        _completion_against_n(case, where, folder / "metadata_completion_vs_n.png"),
        _bars([r for r in case if r["N"] == n], f"{where}, N = {n}", folder / "metadata_paths.png"),
        _memory(case, where, folder / "metadata_memory.png"),
    ]


def _nearest(values: Iterable[int], wanted: int) -> int:
    return min(values, key=lambda value: (abs(value - wanted), value))


def _figure(title: str, width: float = 9, height: float = 5.4):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="both", alpha=0.25, which="major")
    return figure, axes


def _save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _of_series(results: list[Result], path: str, copy: str, generator: str) -> list[Result]:
    found = [r for r in results if (r["path"], r["copy"], r["generator"]) == (path, copy, generator)]
    return sorted(found, key=lambda r: r["N"])


def _completion_against_n(results: list[Result], where: str, path: Path) -> Path:
    figure, axes = _figure(f"Metadata of one draft step group\n{where}")
    for name, *key, colour in SERIES:
        points = _of_series(results, *key)
        if not points:
            continue
        n = [r["N"] for r in points]
        axes.plot(n, [r["completion_us"] for r in points], marker="o", label=name, color=colour)
        low, high = ([r[f"completion_{p}_us"] for r in points] for p in ("p10", "p90"))
        axes.fill_between(n, low, high, color=colour, alpha=0.12, linewidth=0)
    floors = sorted({r["copy"] for r in results if r["path"] == "floor" and r["copy"] == "copy_"})
    for name in floors:
        values = sorted(r["completion_us"] for r in results if r["path"] == "floor" and r["copy"] == name)
        axes.axhline(values[len(values) // 2], color="black", linestyle=":", linewidth=1)
        axes.annotate("one copy_ of bs int32", (0.01, values[len(values) // 2]), fontsize=8, va="bottom",
                      xycoords=("axes fraction", "data"))  # fmt: skip
    axes.set_yscale("log")
    axes.set_xticks(sorted({r["N"] for r in results}))
    axes.set_xlabel("draft backends N")
    axes.set_ylabel("completion, us (median; band p10 to p90)")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _save(figure, path)


def _bars(results: list[Result], where: str, path: Path) -> Path:
    entries = [
        (name, points[0], colour) for name, *key, colour in SERIES if (points := _of_series(results, *key))
    ][::-1]
    figure, axes = _figure(f"Completion of one step group (bars) and the host's part (ticks)\n{where}")
    longest = max(r["completion_us"] for _, r, _ in entries)
    for y, (_, r, colour) in enumerate(entries):
        axes.barh(y, r["completion_us"], color=colour, height=0.7)
        axes.plot([r["enqueue_us"]] * 2, [y - 0.35, y + 0.35], color="black", linewidth=2)
        ratio = f"  ({r['ratio']:.1f}x)" if r["ratio"] else ""
        what = "launch" if r["device"] == "cuda" else "operator"
        count = round(r["launches"] or 0)
        launches = f", {count} {what}{'' if count == 1 else 'es' if what == 'launch' else 's'}"
        axes.text(r["completion_us"] + longest * 0.01, y, f"{r['completion_us']:.1f} us{ratio}{launches}",
                  va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(entries)), [name for name, _, _ in entries], fontsize=9)
    axes.set_xlim(0, longest * 1.3)
    axes.set_xlabel("us")
    axes.grid(False, axis="y")
    return _save(figure, path)


def _memory(results: list[Result], where: str, path: Path) -> Path:
    figure, axes = _figure(f"Page tables held, and bytes moved at every replay\n{where}")
    for name, *key, colour in (
        s for s in SERIES if s[1] in ("recompute", "shared", "indirect") or s[2] in ("fused", "direct")
    ):
        points = _of_series(results, *key)
        if not points:
            continue
        n = [r["N"] for r in points]
        axes.plot(n, [r["table_bytes"] / 2**20 for r in points], marker="o", color=colour,
                  label=f"{name}: held")  # fmt: skip
        axes.plot(n, [r["bytes"] / 2**20 for r in points], marker="x", linestyle="--", color=colour,
                  label=f"{name}: moved")  # fmt: skip
    axes.set_xticks(sorted({r["N"] for r in results}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("draft backends N")
    axes.set_ylabel("MiB")
    axes.legend(fontsize=8, frameon=False)
    return _save(figure, path)
