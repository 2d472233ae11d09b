"""One contract over the whole registry of norms, on drawn shapes; a new norm is found by itself."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fednorm.cards import NORMS
from fednorm.errors import ConfigError
from fednorm.norm_contract import CHECKS, Case, check_program

SHAPES = st.one_of(
    st.tuples(st.integers(2, 4), st.sampled_from((8, 16)), st.integers(2, 4), st.integers(2, 5)),
    st.tuples(st.integers(2, 4), st.sampled_from((8, 16)), st.integers(2, 6)),
    st.tuples(st.integers(3, 6), st.sampled_from((8, 16))),
)
"""(N, C, H, W), (N, C, L) and (N, C)."""

FIXED = ((3, 8, 3, 4), (3, 8, 5), (5, 8))


def case_of(name: str, shape: tuple[int, ...], seed: int = 0) -> Case:
    return Case(NORMS[name], NORMS[name].made(), shape, seed)


def takes(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a norm takes such inputs: one for tokens alone refuses maps, in words."""
    try:
        case_of(name, shape).unit()
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("name", NORMS.names)
def test_every_norm_takes_some_inputs(name: str) -> None:
    assert any(takes(name, shape) for shape in FIXED)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NORMS.names)
@settings(max_examples=2, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shape=SHAPES, seed=st.integers(0, 2**16))
def test_every_norm_keeps_the_contract(name: str, check: str, shape: tuple[int, ...], seed: int) -> None:
    assume(takes(name, shape))
    CHECKS[check](case_of(name, shape, seed))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NORMS.names)
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(shape=SHAPES, seed=st.integers(0, 2**16))
def test_every_norm_keeps_the_contract_on_many_shapes(name: str, check: str, shape: tuple[int, ...], seed: int) -> None:
    assume(takes(name, shape))
    CHECKS[check](case_of(name, shape, seed))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["compile", "export"])
@pytest.mark.parametrize("shape", FIXED, ids=["maps", "sequences", "features"])
@pytest.mark.parametrize("name", NORMS.names)
def test_programs_can_be_made_of_every_norm(name: str, shape: tuple[int, ...], how: str) -> None:
    if takes(name, shape):
        check_program(case_of(name, shape), how)
