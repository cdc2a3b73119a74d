"""Question 2: why was Triton's batched copy slower, and when does it win?"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from .bench import Bench, Point, Row
from .pairs import COLOURS, Pairs, methods_on
from .question import Question, Table, bars, figure, logarithmic, only, pivot, save, select

PUBLISHED_SIZES = (32, 64, 128, 256, 512, 1024, 2048)  # elements of the seven tensors
PUBLISHED_US = {"copy_": 28.70, "Triton, a launch for each tensor": 40.85}
TENSORS = (1, 2, 3, 5, 7, 10, 15, 20, 35)
BUILT_BY_CALL = "Triton, one launch, tables built by each call"
# Those of triton_forms.py, which needs Triton: a plot of an earlier run does not.
FORM_NAMES = (
    "Triton, a launch for each tensor",
    BUILT_BY_CALL,
    "Triton, one launch, tables built once",
    "Triton, one launch, compiled kernel called directly",
)
FORM_COLOURS = dict(zip(FORM_NAMES, ("#444444", "#999999", "#80b1d3", "#35978f")))


def measure(bench: Bench) -> list[Row]:
    from .triton_forms import FORMS

    points = []
    counts = TENSORS[:2] if bench.quick else TENSORS
    for sizes in (PUBLISHED_SIZES, *((512,) * n for n in counts)):
        pairs = Pairs.vectors(sizes, bench.device)
        forms = {name: form(pairs) for name, form in zip(FORM_NAMES, FORMS)}
        pairs.check(forms)
        calls = methods_on(bench.device, pairs, ("copy_", "foreach", "fused")) | forms
        labels = {"what": "published" if sizes == PUBLISHED_SIZES else "sweep", "tensors": len(sizes)}
        points.append(Point(calls, labels))
    rows = bench.sweep(points, eager_only=(BUILT_BY_CALL,))
    loops = bench.loops_us([call for point in points for call in point.calls.values()])
    return [{**row, "loop_us": us} for row, us in zip(rows, loops)] + _parts(bench)


def _parts(bench: Bench) -> list[Row]:
    """What a call that builds its tables is made of."""
    from .triton_forms import pointer_lists

    pairs = Pairs.vectors(PUBLISHED_SIZES, bench.device)
    lists = pointer_lists(pairs)
    on_host = [torch.tensor(values, dtype=torch.int64) for values in lists]
    parts = {
        "addresses and sizes into three lists (Python)": partial(pointer_lists, pairs),
        "three lists to three tensors on the host": lambda: [
            torch.tensor(v, dtype=torch.int64) for v in lists
        ],
        "three tensors to the device, each waited for": lambda: [t.to(bench.device) for t in on_host],
    }
    return bench.rows(parts, graphs=False, what="part")


def tables(rows: list[Row]) -> list[Table]:
    published = select(rows, what="published")
    columns = ("loop_us", "completion_us", "enqueue_us", "gpu_us", "launches", "graph_gpu_us")
    headers = [
        "seven tensors of 32 .. 2,048 int32",
        "published us",
        "in a loop us",
        "completion us",
        "enqueue us",
        "GPU us",
        "launches",
        "in a graph, GPU us",
    ]
    detail = Table(
        headers,
        [[r["method"], PUBLISHED_US.get(r["method"]), *(r.get(c) for c in columns)] for r in published],
    )
    parts = [[row["method"], row["enqueue_us"]] for row in select(rows, what="part")]
    parts += [[name, us] for name, us in _differences(published)]
    return [
        detail,
        Table(["what a call is made of", "enqueue us"], parts),
        pivot(
            select(rows, what="sweep"),
            "method",
            "tensors",
            "loop_us",
            "in a loop, us, by number of tensors of 2 KiB",
        ),
    ]


def _differences(published: list[Row]) -> list[tuple[str, float]]:
    """What one form does and another does not."""
    each, by_call, once, compiled = (only(published, method=form)["enqueue_us"] for form in FORM_NAMES)
    return [
        ("tables built by each call: more than with tables built once", by_call - once),
        ("seven launches: more than one launch", each - once),
        ("one launch: Triton's search for its compiled kernel (Python)", once - compiled),
        ("one launch: the rest (arguments, driver)", compiled),
    ]


def plot(rows: list[Row], where: str, path: Path) -> None:
    drawn, (left, right) = figure(
        "The batched Triton copy: calls in a loop, one synchronization at the end", where, 2
    )
    published = select(rows, what="published")
    colours = [_colour(row["method"]) for row in published]
    labels = [row["method"].replace(", ", ",\n", 1) for row in published]
    bars(
        left,
        labels,
        [row["loop_us"] for row in published],
        colours,
        "us a call, seven tensors of 32 .. 2,048 int32",
    )
    for name, us in PUBLISHED_US.items():
        left.axvline(us, linestyle=":", color=_colour(name), label=f"published: {name}, {us} us")
    left.legend(fontsize=7, loc="lower right")
    for method in [row["method"] for row in published]:
        points = select(rows, what="sweep", method=method)
        right.plot(
            [p["tensors"] for p in points],
            [p["loop_us"] for p in points],
            marker="o",
            color=_colour(method),
            label=method,
        )
    logarithmic(right)
    right.set(xlabel="tensors of 2 KiB", ylabel="us a call")
    save(drawn, path)


def _colour(method: str) -> str:
    return COLOURS.get(method) or FORM_COLOURS[method]


QUESTION = Question(
    "triton_copy",
    "Why was Triton's batched copy slower, and when does it win?",
    measure,
    tables,
    plot,
    needs_cuda=True,
)
