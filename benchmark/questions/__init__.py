"""The questions of the study, in its order. Each is a file: what is measured, its tables, its plot."""

from __future__ import annotations

from . import (
    claims,
    copy_methods,
    destinations,
    floors,
    future,
    kernel_shape,
    options,
    page_tables,
    triton_copy,
)
from .question import Question

QUESTIONS: tuple[Question, ...] = tuple(
    module.QUESTION
    for module in (
        copy_methods,
        triton_copy,
        page_tables,
        options,
        kernel_shape,
        destinations,
        future,
        claims,
        floors,
    )
)
