"""Every recipe of docs/frameworks/exact-resume.md is exact."""

from __future__ import annotations

import pytest

from incckpt.testing import assert_exact_resume
from tests.testing import exact_trainings

pytestmark = pytest.mark.slow

RECIPES = ["with_a_sampler", "with_accumulation", "with_amp_and_ema", "compiled"]


@pytest.mark.parametrize("make", RECIPES)
def test_a_recipe(make: str) -> None:
    assert_exact_resume(getattr(exact_trainings, make), steps=9, kill_at=[7])  # in the middle of an epoch, and of three batches


def test_a_sampler_that_was_left_out_is_found() -> None:
    with pytest.raises(AssertionError, match=r"after the resume at step 4"):
        assert_exact_resume(exact_trainings.without_sampler, steps=6, kill_at=[4])


def test_what_may_differ_is_left_out() -> None:
    with pytest.raises(AssertionError, match=r"before any resume.*clock"):
        assert_exact_resume(exact_trainings.with_a_clock, steps=2, kill_at=[1])
    assert_exact_resume(exact_trainings.with_a_clock, steps=2, kill_at=[1], ignore=["clock.*"])


def test_trainings_that_fail_are_shown() -> None:
    with pytest.raises(AssertionError, match="no such thing"):
        assert_exact_resume(exact_trainings.that_raises, steps=2)
    with pytest.raises(AssertionError, match="ended after step 3, of 4"):
        assert_exact_resume(exact_trainings.that_ends_early, steps=4)
