"""Dataset folders: what was built is read back; what was written by hand is read or refused by file and line."""

from __future__ import annotations

import json

import pytest

from ie.data.build import Source, build
from ie.data.dataset import Dataset
from ie.errors import DataError, InputError

LINE = {"task": "people", "subject": "Town 0", "prompt": "The river of Town 0 is the", "target": "Stream"}


@pytest.fixture
def folder(tmp_path):
    """A dataset folder written by hand."""
    path = tmp_path / "hand"
    path.mkdir()
    (path / "dataset.json").write_text('{"format_version": 1}', encoding="utf-8")
    (path / "train.jsonl").write_text(json.dumps(LINE) + "\n", encoding="utf-8")
    (path / "validation.jsonl").write_text("", encoding="utf-8")
    (path / "test.jsonl").write_text(json.dumps({**LINE, "subject": "Town 1"}) + "\n", encoding="utf-8")
    return path


def test_what_was_built_is_read_back(tmp_path, write, make_facts):
    source = write(make_facts(200))
    built = build(tmp_path / "out", [Source("people", None, source), Source("places", "test", source)])
    dataset = Dataset.load(tmp_path / "out")
    assert dataset.fingerprint == built["fingerprint"] == dataset.info["fingerprint"]
    assert dataset.tasks == ("people", "places")
    for task, counts in built["tasks"].items():
        for split in ("train", "validation", "test"):
            assert len(dataset.records(split, [task])) == counts[split]
    assert len(dataset.records("test")) == sum(counts["test"] for counts in built["tasks"].values())


def test_lines_by_hand_need_only_four_fields(folder):
    dataset = Dataset.load(folder)
    (record,) = dataset.records("train")
    assert (record.id, record.task, record.target) == ("train-1", "people", "Stream")
    assert dataset.tasks == ("people",)


def test_the_fingerprint_follows_the_records(folder):
    before = Dataset.load(folder).fingerprint
    assert before == Dataset.load(folder).fingerprint
    (folder / "train.jsonl").write_text(json.dumps({**LINE, "target": "Brook"}), encoding="utf-8")
    assert Dataset.load(folder).fingerprint != before


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train.jsonl", "\n{broken\n", r"train\.jsonl, line 2: "),
        ("test.jsonl", json.dumps(LINE | {"targte": "x"}), r"test\.jsonl, line 1: field `targte`: unknown field"),
        ("train.jsonl", "\n" + json.dumps({"task": "people"}), r"line 2: field `subject`: missing; field `prompt`"),
        ("train.jsonl", json.dumps({**LINE, "target": " "}), "field `target`: empty"),
        ("train.jsonl", json.dumps({**LINE, "instruction": {"test": []}}), r"field `instruction\.test`: unknown"),
        ("train.jsonl", json.dumps({**LINE, "instruction": {"train": "text"}}), "field `instruction"),
        ("validation.jsonl", json.dumps({**LINE, "subject": " tOWN  0"}), "stands in two splits, train and validation"),
        ("validation.jsonl", json.dumps({**LINE, "id": "train-1"}), "the id 'train-1' stands twice"),
        ("dataset.json", "{\n,", r"dataset\.json, line 2: broken JSON"),
        ("dataset.json", "[]", "no format_version"),
        ("dataset.json", '{"format_version": 99}', "dataset format 99"),
        ("dataset.json", '{"format_version": -1}', "no format_version"),
        ("dataset.json", "1" * 5000, "cannot be read"),
        ("dataset.json", "[" * 100_000, "cannot be read|broken JSON"),
        ("train.jsonl", "[" * 100_000, "line 1"),
    ],
)
def test_a_wrong_folder_is_refused(folder, file, text, message):
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        Dataset.load(folder)
    assert error.value.hint


@pytest.mark.parametrize("file", ["train.jsonl", "validation.jsonl", "test.jsonl", "dataset.json"])
def test_a_missing_file(folder, file):
    (folder / file).unlink()
    with pytest.raises(DataError, match=file):
        Dataset.load(folder)


def test_a_missing_folder(tmp_path):
    with pytest.raises(DataError, match="no dataset folder"):
        Dataset.load(tmp_path / "none")


def test_unknown_task_and_split(folder):
    dataset = Dataset.load(folder)
    with pytest.raises(InputError, match="no task 'peple'") as error:
        dataset.records("train", ["peple"])
    assert "did you mean 'people'?" in error.value.hint
    with pytest.raises(InputError, match="unknown split"):
        dataset.records("dev")
