"""Figures: every step in a file of lines, always; and in a tracker that is asked for."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ie.errors import InputError
from ie.training import TrainSettings, train
from ie.training.metrics import METRICS, Metrics


@pytest.fixture
def settings(checkpoint: Callable[..., Path], dataset: Path, tmp_path: Path) -> TrainSettings:
    return TrainSettings(
        model=str(checkpoint("llama")), data=dataset, out=tmp_path / "editor", method="mend", device="cpu", steps=3,
        batch_size=4, rank=8, n_fit=8, n_validation=4, validate_every=2,
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_and_validation_is_a_line(settings: TrainSettings) -> None:
    result = train(settings)
    found = lines(settings.out / METRICS)
    kinds = [(one["kind"], one["step"]) for one in found]
    assert kinds == [("validation", 0), ("step", 1), ("step", 2), ("validation", 2), ("step", 3), ("validation", 3)]
    for one in found:
        figures = {"reliability", "generalization", "locality"}
        if one["kind"] == "step":
            figures = {"edit_loss", "locality_loss", "learning_rate", "episodes_per_second"}
        assert set(one) == {"kind", "step", "seconds"} | figures
    assert any({**one, **result["validation"]} == one for one in found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own imports
def test_tensorboard_gets_the_figures(settings: TrainSettings) -> None:
    train(settings.model_copy(update={"report_to": "tensorboard"}))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = settings.out.parent.glob("editor.tensorboard")
    events = EventAccumulator(str(folder)).Reload()
    losses = [event.value for event in events.Scalars("edit_loss")]
    written = [one["edit_loss"] for one in lines(settings.out / METRICS) if one["kind"] == "step"]
    assert losses == pytest.approx(written)
    assert [event.step for event in events.Scalars("validation/locality")] == [0, 2, 3]


def test_trackio_gets_the_figures_and_standard_output_nothing(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(settings.out.parent / "trackio"))
    train(settings.model_copy(update={"report_to": "trackio"}))
    assert capfd.readouterr().out == ""
    (found,) = settings.out.parent.glob("trackio/*.db")
    with sqlite3.connect(found) as database:
        logged = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by id")]
    losses = [one["edit_loss"] for one in logged if "edit_loss" in one]
    assert losses == pytest.approx([one["edit_loss"] for one in lines(settings.out / METRICS) if one["kind"] == "step"])
    assert sum("validation/locality" in one for one in logged) == 3


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_refused(settings: TrainSettings) -> None:
    with pytest.raises(InputError, match="wandb is not installed") as found:
        train(settings.model_copy(update={"report_to": "wandb"}))
    assert found.value.hint == "pip install wandb"
    assert not settings.out.exists()


def test_a_resumed_run_cuts_off_what_came_after_its_checkpoint(settings: TrainSettings, tmp_path: Path) -> None:
    notes: list[str] = []
    first = Metrics(tmp_path, settings, 0, notes.append)
    for step in range(1, 6):
        first.write("step", step, 0.1, {"edit_loss": float(step)})
    with first.path.open("a") as file:
        file.write('{"kind": "st')  # killed while writing
    again = Metrics(tmp_path, settings, 3, notes.append)
    again.write("step", 4, 0.1, {"edit_loss": 4.0})
    assert [one["step"] for one in lines(again.path)] == [1, 2, 3, 4]
    again.path.unlink()
    again.path.mkdir()  # nothing can be written there
    again.write("step", 5, 0.1, {})
    again.write("step", 6, 0.1, {})
    assert len(notes) == 1 and "cannot be written" in notes[0]
