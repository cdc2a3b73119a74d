"""A question of the study: how it is measured, its tables, and its plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import Bench, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Printed as markdown; a cell that is a number is rounded, None is a dash."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __str__(self) -> str:
        lines = [list(self.headers), ["---", *["---:"] * (len(self.headers) - 1)]]
        lines += [[_cell(value, header) for value, header in zip(row, self.headers)] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Question:
    """`measure` gives rows for the JSON; `tables` and `plot` are made of such rows alone."""

    name: str  # of its file, its plot and its place in the document
    title: str
    measure: Callable[[Bench], list[Row]]
    tables: Callable[[list[Row]], list[Table]]
    plot: Callable[[list[Row], str, Path], None]
    needs_cuda: bool = False


def select(rows: Sequence[Row], **labels: Any) -> list[Row]:
    """The rows with all of these labels."""
    return [row for row in rows if all(row.get(key) == value for key, value in labels.items())]


def only(rows: Sequence[Row], **labels: Any) -> Row:
    """The one row with these labels."""
    (row,) = select(rows, **labels)
    return row


def unique(rows: Sequence[Row], label: str) -> list[Any]:
    """The values of a label, in the order in which they come."""
    return list(dict.fromkeys(row[label] for row in rows if label in row))


def pivot(rows: Sequence[Row], down: str, across: str, value: str, name: str) -> Table:
    """A table of one value, by two labels."""
    columns = unique(rows, across)
    cells = {(row[down], row[across]): row.get(value) for row in rows}
    lines = [[first, *(cells.get((first, column)) for column in columns)] for first in unique(rows, down)]
    return Table([name, *map(str, columns)], lines)


def figure(title: str, where: str, across: int = 1, down: int = 1) -> tuple[Figure, list[Axes]]:
    """Panels under a title, and the machine."""
    import matplotlib.pyplot as plt

    size = (5.2 * max(across, 1.6), 4.6 if down == 1 else 3.2 * down)
    drawn, grid = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    axes = list(grid.flat)
    drawn.suptitle(f"{title}\n{where}", fontsize=11)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(True, alpha=0.25)
    return drawn, axes


def logarithmic(axes: Axes, x: bool = False, y: bool = True) -> None:
    """Log scales with plain numbers at 1, 2, 5, 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for wanted, axis, scale in ((x, axes.xaxis, axes.set_xscale), (y, axes.yaxis, axes.set_yscale)):
        if wanted:
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    if x:
        axes.tick_params("x", labelsize=8)


def bars(
    axes: Axes, labels: Sequence[str], values: Sequence[float], colours: Sequence[str], unit: str = "us"
) -> None:
    """Horizontal bars, the first on top, each with its value."""
    places = range(len(labels))[::-1]
    axes.barh(places, values, color=colours, height=0.7)
    for place, value in zip(places, values):
        axes.text(value + max(values) * 0.01, place, f"{value:.1f}", va="center", fontsize=8)
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_xlim(0, max(values) * 1.15)
    axes.set_xlabel(unit)
    axes.grid(False, axis="y")


def save(drawn: Figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    drawn.savefig(path, dpi=140)
    plt.close(drawn)


def size_name(size: int) -> str:
    """Bytes in the largest unit that leaves a whole number."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024 or size % 1024:
            return f"{size} {unit}"
        size //= 1024
    return f"{size} GiB"


def _cell(value: Any, header: str) -> str:
    if value is None:
        return "-"
    if header == "launches" and isinstance(value, float):
        return f"{value:.0f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"
    return str(value)
