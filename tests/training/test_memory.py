"""The memory estimate: what can be counted exactly is; the rest grows with what it should grow with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ie.base import Base
from ie.base.plan import plan_load
from ie.editor.editor import Editor, EditorSettings
from ie.errors import ModelError
from ie.training.memory import estimate_memory
from ie.training.settings import TrainSettings


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_weights_and_editor_are_counted_exactly(
    name: str, checkpoint: Callable[..., Path], load: Callable[..., Base]
) -> None:
    found = estimate_memory(str(checkpoint(name)), plan_load("none", "float32", "cpu"))
    base, settings = load(name), TrainSettings()
    assert found["base"] == sum(p.nbytes for p in base.model.parameters())
    editor = Editor(base.targets, EditorSettings(rank=settings.rank, n_layers=settings.n_layers))
    assert found["editor"] == 5 * sum(p.nbytes for p in editor.parameters())
    parts = ("base", "editor", "activations", "stores_at_most")
    assert found["training"] == sum(found[part] for part in parts)


def test_what_makes_it_larger(checkpoint: Callable[..., Path]) -> None:
    name = str(checkpoint("llama"))
    full = estimate_memory(name, plan_load("none", "float32", "cpu"))
    eight, four = (estimate_memory(name, plan_load(quant, "float32", "cpu")) for quant in ("8bit", "4bit"))
    assert four["base"] < eight["base"] < full["base"]
    larger = estimate_memory(name, plan_load("none", "float32", "cpu"), TrainSettings(batch_size=32))
    assert larger["activations"] == pytest.approx(2 * full["activations"])


def test_a_folder_without_a_configuration_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        estimate_memory(str(tmp_path), plan_load())
