"""The report on a tiny base: its rows, their keys, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ie.base import Base
from ie.data.build import Source, build
from ie.data.dataset import Dataset
from ie.data.record import Record
from ie.editor import Editor, EditorSettings, save_editor
from ie.errors import BaseMismatchError, InputError, TemplateError
from ie.evaluation import evaluate
from ie.evaluation.report import _other_instructions

TEMPLATES = Path(__file__).parents[2] / "templates"

ROW = {"task", "method", "query", "decoding", "metric", "value", "low", "high", "n"}


def save(
    base: Base,
    folder: Path,
    method: str = "instructedit",
    tasks: tuple[str, ...] = ("people",),
    holdout: tuple[str, ...] = ("zsre",),
) -> Path:
    settings = EditorSettings.model_validate({"method": method, "rank": 4, "rate": 0.1})
    save_editor(folder, Editor(base.targets, settings), base, tasks=tasks, holdout=holdout, training={}, validation={})
    return folder


def check_rows(rows: list[dict[str, Any]], extra: set[str]) -> None:
    for row in rows:
        assert set(row) >= ROW and set(row) - ROW <= extra
        assert row["low"] <= row["value"] <= row["high"] and row["n"] >= 1
        assert row["query"] in ("plain", "instructed") and row["decoding"] in ("forced", "generated")
        if row["metric"] != "fluency":
            assert row["low"] >= 0 and row["high"] <= 1
        if row["metric"] == "locality" and row["method"] == "none":
            assert row["value"] == 1.0


def test_an_editor_beside_the_base(load: Callable[..., Base], dataset: Path, tmp_path: Path) -> None:
    base = load("llama")
    folder = save(base, tmp_path / "editor")
    notes: list[str] = []
    found = evaluate(editors=[folder], data=dataset, tasks=["people"], limit=2, device="cpu", on_note=notes.append)
    assert set(found) >= {"holdout", "base", "editor", "rows", "seed", "versions"}
    assert (found["holdout"], found["base"], found["editor"]) == ("zsre", base.id, [str(folder)])
    check_rows(found["rows"], {"editor"})
    assert [row["method"] for row in found["rows"]].count("none") == len(found["rows"]) / 2
    metrics = {row["metric"] for row in found["rows"]}
    assert metrics >= {"reliability", "generalization", "locality", "fluency"}
    assert {row["task"] for row in found["rows"]} == {"people"} and "people: 2 records" in notes


def test_controls_tell_the_editor_other_things(load: Callable[..., Base], dataset: Path, tmp_path: Path) -> None:
    folders = [save(load("llama"), tmp_path / name, name) for name in ("instructedit", "mend")]
    found = evaluate(
        editors=folders, data=dataset, tasks=["people"], limit=2, generate=False, controls=True, device="cpu"
    )
    check_rows(found["rows"], {"editor", "control", "style"})
    controls = [row for row in found["rows"] if "control" in row]
    assert {row["method"] for row in controls} == {"instructedit"}
    assert {row["control"] for row in controls} == {"right", "none", "wrong-task", "random", "unseen"}
    assert {row["method"] for row in found["rows"]} == {"none", "instructedit", "mend"}
    styles = {row["style"] for row in controls if "style" in row}
    assert len(styles) == 5 and all(row["control"] == "unseen" for row in controls if "style" in row)
    gaps = [row for row in found["differences"] if "control" in row]
    assert {(row["control"], row["versus_control"]) for row in gaps} == {
        ("right", other) for other in ("none", "wrong-task", "random", "unseen")
    }
    assert all(row["low"] <= row["value"] <= row["high"] for row in found["differences"])


def test_controls_take_the_templates_that_the_dataset_was_built_with(tmp_path: Path) -> None:
    own = yaml.safe_load((TEMPLATES / "people.yaml").read_text())
    own |= {"train": [f"Training text {n}." for n in range(10)], "layout": "{{ instruction }}"}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "people.yaml").write_text(yaml.safe_dump(own))
    (tmp_path / "facts.jsonl").write_text(
        "".join(
            json.dumps({"task": "people", "subject": f"Ann {n}", "prompt": f"Ann {n} is in", "target": "Varn"}) + "\n"
            for n in range(3)
        )
    )
    source = Source.parse(f"people:test={tmp_path / 'facts.jsonl'}")
    build(tmp_path / "data", [source], templates=tmp_path / "own")
    dataset = Dataset.load(tmp_path / "data")
    records = dataset.records("test")
    told = _other_instructions("people", records, dataset)
    assert told["right", ""] == ["Training text 0.", "Training text 1.", "Training text 2."]
    assert told["unseen", own["heldout"][1]["style"]][0] == records[0].instruction.heldout[1]
    (tmp_path / "data" / "templates.json").unlink()  # as an earlier version built it
    with pytest.raises(TemplateError, match="not known"):
        dataset.templates()
    (tmp_path / "data" / "templates.json").write_text("[1]")
    with pytest.raises(TemplateError, match="holds no templates"):
        dataset.templates()


def test_other_tasks_instructions_take_turns(dataset: Path) -> None:
    loaded = Dataset.load(dataset)
    records = loaded.records("test", ["people"]) * 4
    told = _other_instructions("people", records, loaded)["wrong-task", ""]
    homes = {text: one.task for one in loaded.records("test") for text in one.instruction.heldout}
    tasks = [homes[text] for text in told if text is not None]
    others = [task for task in loaded.tasks if task != "people"]
    assert tasks == [others[i % len(others)] for i in range(len(records))]
    assert len(set(told)) > len(others)  # in several wordings


def test_a_dataset_of_bundled_templates_needs_no_file(dataset: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dataset, tmp_path / "data")
    with_file = Dataset.load(folder).templates()
    (folder / "templates.json").unlink()
    assert Dataset.load(folder).templates() == with_file


def test_training_free_methods(checkpoint: Callable[..., Path], dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ie.evaluation.report._N_TUNING", 2)
    monkeypatch.setattr("ie.evaluation.report._N_FIT", 4)
    found = evaluate(
        editors=[],
        data=dataset,
        model=str(checkpoint("gpt2")),
        tasks=["people"],
        methods=["finetune", "gradient", "ultra"],
        limit=1,
        generate=False,
        device="cpu",
    )
    check_rows(found["rows"], {"rate", "steps", "regularisation"})
    assert {row["method"] for row in found["rows"]} == {"none", "finetune", "gradient", "ultra"}
    assert found["holdout"] is None and found["editor"] == []


def test_a_holdout_that_was_trained_on_is_refused(load: Callable[..., Base], dataset: Path, tmp_path: Path) -> None:
    folder = save(load("llama"), tmp_path / "editor", tasks=("people", "places"))
    with pytest.raises(InputError, match="was trained on it") as caught:
        evaluate(editors=[folder], data=dataset, holdout="places", device="cpu")
    assert caught.value.exit_code == 2 and "--holdout places" in str(caught.value)


@pytest.mark.parametrize(("given", "held"), [(None, None), ("none", None), ("places", "places")])
def test_the_holdout_is_one_that_no_editor_saw(
    load: Callable[..., Base], dataset: Path, tmp_path: Path, given: str | None, held: str | None
) -> None:
    folders = [save(load("llama"), tmp_path / name, tasks=(name,)) for name in ("people", "zsre")]
    found = evaluate(
        editors=folders, data=dataset, tasks=["people"], holdout=given, limit=1, generate=False, device="cpu"
    )
    assert found["holdout"] == held


def test_nothing_is_fitted_or_chosen_on_any_editors_holdout(
    load: Callable[..., Base], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[set[str]] = []

    def watch(records: list[Record], limit: int | None, seed: int) -> list[Record]:
        used.append({record.task for record in records})
        return records[:2]

    monkeypatch.setattr("ie.evaluation.report._limited", watch)
    folder = save(load("llama"), tmp_path / "editor", holdout=("zsre", "places"))
    options: dict[str, Any] = {"tasks": ["zsre"], "methods": ["gradient"], "generate": False, "device": "cpu"}
    evaluate(editors=[folder], data=dataset, **options)
    assert used[:2] == [{"convsent", "general", "people"}] * 2


@pytest.mark.parametrize(("holdout", "n"), [("zsre", 0), ("none", 2)])
def test_nothing_is_fitted_or_chosen_on_the_holdout(
    checkpoint: Callable[..., Path], dataset: Path, monkeypatch: pytest.MonkeyPatch, holdout: str, n: int
) -> None:
    used: list[str] = []

    def watch(records: list[Record], limit: int | None, seed: int) -> list[Record]:
        used.append(",".join(sorted({record.task for record in records})))
        return records[:2]

    monkeypatch.setattr("ie.evaluation.report._limited", watch)
    model = str(checkpoint("gpt2"))
    evaluate(editors=[], data=dataset, model=model, methods=["gradient"], holdout=holdout, generate=False, device="cpu")
    assert sum("zsre" in tasks for tasks in used[:2]) == n


def test_another_base_is_refused(
    load: Callable[..., Base], checkpoint: Callable[..., Path], dataset: Path, tmp_path: Path
) -> None:
    folder = save(load("llama"), tmp_path / "editor")
    with pytest.raises(BaseMismatchError):
        evaluate(editors=[folder], data=dataset, model=str(checkpoint("gpt2")), device="cpu")


def test_a_task_without_records_is_refused(checkpoint: Callable[..., Path], dataset: Path) -> None:
    with pytest.raises(InputError, match="no task 'unknown'"):
        evaluate(editors=[], data=dataset, model=str(checkpoint("gpt2")), tasks=["unknown"], device="cpu")


def test_settings_are_not_chosen_on_test_records(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "facts.jsonl").write_text('{"task": "zsre", "subject": "Orm", "prompt": "Orm is in", "target": "Varn"}')
    build(tmp_path / "data", [Source.parse(f"zsre:test={tmp_path / 'facts.jsonl'}")])
    options: dict[str, Any] = {"data": tmp_path / "data", "model": str(checkpoint("gpt2")), "device": "cpu"}
    assert evaluate(editors=[], generate=False, **options)["rows"]
    with pytest.raises(InputError, match="finetune: settings are chosen on training and validation records"):
        evaluate(editors=[], methods=["finetune"], generate=False, **options)


def test_the_same_call_gives_the_same_rows(checkpoint: Callable[..., Path], dataset: Path) -> None:
    options: dict[str, Any] = {"data": dataset, "model": str(checkpoint("gpt2")), "tasks": ["zsre"], "limit": 2}
    rows = [evaluate(editors=[], generate=False, device="cpu", **options)["rows"] for _ in range(2)]
    assert rows[0] == rows[1]
