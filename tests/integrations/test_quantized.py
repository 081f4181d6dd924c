"""Quantised weights and optimizer states, over torchao and bitsandbytes: restored, they go on bit for bit."""

from __future__ import annotations

import pytest

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")

from tests.integrations.quantized import cases
from tests.peers.protocol import Case, try_case


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.group} {case.name}") for case in cases()])
def test_what_was_restored_goes_on_as_if_nothing_had_happened(case: Case) -> None:
    row = try_case(case)
    if row.verdict == "void":
        pytest.skip(row.by_hand)
    assert row.through_incckpt == "identical", f"torch.save: {row.by_hand}"
