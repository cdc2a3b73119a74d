"""Random cases through hypothesis: any regions, lengths and layout; fuzz_metadata.py draws the same cases."""

from __future__ import annotations

import random

import sgl_kernel
from copy_cases import CopyRig, random_copy_case
from generate_cases import GenerateRig, random_generate_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

COMMON = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


@COMMON
@given(st.data())
def test_copy(data: st.DataObject) -> None:
    assert sgl_kernel.load_error("cpu") is None
    CopyRig(random_copy_case(lambda low, high: data.draw(st.integers(low, high)), runs=2), "cpu").check()


@COMMON
@given(st.data())
def test_generate(data: st.DataObject) -> None:
    assert sgl_kernel.load_error("cpu") is None
    GenerateRig(
        random_generate_case(lambda low, high: data.draw(st.integers(low, high)), runs=2), "cpu"
    ).check()


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.integers(0, 2**40))
def test_seeded_cases(seed: int) -> None:
    """Hypothesis keeps drawn cases small; a seeded generator reaches the large ones too."""
    rng = random.Random(seed)
    if seed % 2:
        CopyRig(random_copy_case(rng.randint), "cpu").check()
    else:
        GenerateRig(random_generate_case(rng.randint), "cpu").check()
