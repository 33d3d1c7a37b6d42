"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Nothing in the suite may wait for a network: set before any library reads it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def published_data() -> Path:
    """The folder of full published datasets, named by IE_DATA; tests that need it are skipped without it."""
    name = os.environ.get("IE_DATA")
    if not name:
        pytest.skip("IE_DATA names no folder of published datasets")
    folder = Path(name)
    if not folder.is_dir():
        pytest.skip(f"IE_DATA={name} is no folder")
    return folder
