"""What the tests over frameworks share: nothing is downloaded, and a framework's own warnings are its own affair."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let frameworks warn; what warns in incckpt, or says so about it, is an error as everywhere."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("error:.*incckpt"))
            item.add_marker(pytest.mark.filterwarnings("error:::incckpt"))
            item.add_marker(pytest.mark.filterwarnings("ignore"))
