"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ie import runtime

if TYPE_CHECKING:
    from ie.base import Base

# Nothing in the suite may wait for a network: set before any library reads it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Threads wait for each other at every operation: with two, on a busy machine, tiny models take fifty times as long.
# Read when torch is imported, here and in every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
# Figures and bits here are a CPU's, whatever machine this is; tests/gpu starts processes that see a GPU.
if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
    os.environ["IE_TEST_GPUS"] = visible
os.environ["CUDA_VISIBLE_DEVICES"] = ""
for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
    os.environ.pop(name, None)  # a user's terminal decides no test
runtime.prepare()  # as `ie` itself does


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left alone with one at the end."""
    with_slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in with_slow)


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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny checkpoints by architecture and seed, each written once; the Llama-like ones begin every text by a token."""
    from tests.models import save_model  # here: it imports torch, which takes seconds, and most tests need none

    @cache
    def folder(name: str, seed: int = 0) -> Path:
        return save_model(tmp_path_factory.mktemp(name), name, seed=seed, bos=name.startswith("llama"))

    return folder


@pytest.fixture(scope="session")
def load(checkpoint: Callable[..., Path]) -> Callable[..., Base]:
    """Tiny bases by architecture, quantisation and dtype, each loaded once; no test may change one."""
    from ie.base import load_base

    @cache
    def base(name: str, quant: str = "none", dtype: str = "float32") -> Base:
        return load_base(str(checkpoint(name)), quant=quant, dtype=dtype, device="cpu")

    return base


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset folder of the bundled facts, all five tasks; no test may change it."""
    from ie.data.build import build

    folder = tmp_path_factory.mktemp("data") / "data"
    build(folder, limit=30)
    return folder
