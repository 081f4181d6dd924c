"""The page about the command line shows what the command says."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cli.transcript import PAGE, comparable, transcript

pytestmark = pytest.mark.slow


def test_the_page_is_what_the_command_says(s3_server: dict[str, Any]) -> None:
    made, kept = comparable(transcript(s3_server["endpoint_url"])), comparable(PAGE.read_text())
    where = next((i for i, (a, b) in enumerate(zip(made, kept, strict=False)) if a != b), min(len(made), len(kept)))
    around = slice(max(0, where - 200), where + 200)
    assert made == kept, f"run python -m tests.cli.transcript:\n{kept[around]}\n---\n{made[around]}"
