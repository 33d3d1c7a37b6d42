"""Building: no subject in two splits, every record accounted for, the folder whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ie.data import build as build_module
from ie.data.build import Source, build
from ie.data.dataset import Dataset
from ie.data.splits import normal_subject
from ie.errors import DataError, InputError, TemplateError

SPLITS = ("train", "validation", "test")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def subjects(dataset: Dataset, split: str) -> set[str]:
    return {normal_subject(record.subject) for record in dataset.records(split)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zsre=f.json", Source("zsre", None, Path("f.json"))),
        ("zsre:test=a=b.json", Source("zsre", "test", Path("a=b.json"))),
        (" zsre : validation = f.json ", Source("zsre", "validation", Path("f.json"))),
    ],
)
def test_sources(text, expected):
    assert Source.parse(text) == expected


@pytest.mark.parametrize("text", ["", "zsre", "=f.json", "zsre=", "zsre:=f.json", ":test=f.json", "zsre:tset=f.json"])
def test_what_is_no_source(text):
    with pytest.raises(InputError) as error:
        Source.parse(text)
    assert error.value.hint
    if "tset" in text:
        assert "did you mean 'test'?" in error.value.hint


def test_split_by_subject_over_all_tasks(tmp_path, write, make_facts):
    people = write(make_facts(300), "people.json")
    places = write([{**fact, "subject": f" {fact['subject'].upper()}"} for fact in make_facts(300)], "places.json")
    built = build(tmp_path / "out", [Source("people", None, people), Source("places", None, places)])
    dataset = Dataset.load(tmp_path / "out")
    found = [subjects(dataset, split) for split in SPLITS]
    assert sum(map(len, found)) == len(set().union(*found)) == 300
    assert built["tasks"]["people"] == built["tasks"]["places"]
    assert 210 < built["tasks"]["people"]["train"] < 270


def test_each_split_carries_its_own_instructions(tmp_path, write, make_facts):
    build(tmp_path / "out", [Source("people", None, write(make_facts(100)))])
    dataset = Dataset.load(tmp_path / "out")
    for split in SPLITS:
        for record in dataset.records(split):
            counts = (len(record.instruction.train), len(record.instruction.heldout))
            assert counts == ((24, 0) if split == "train" else (0, 5))
    line = json.loads((tmp_path / "out" / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert list(line["instruction"]) == ["heldout"]
    assert set(line) == {
        "id", "task", "subject", "prompt", "target", "ground_truth", "rephrases", "locality", "portability",
        "instruction", "fields",
    }  # fmt: skip


def test_where_one_wording_changes_the_others_are_to_stay(tmp_path, write):
    fact = {"prompt": "Tea is", "target": "blue", "ground_truth": "green", "rephrases": ["The colour of tea is"]}
    facts = [{**fact, "subject": f"tea {i}", "prompt": f"Tea {i} is"} for i in range(40)]
    facts += [{**fact, "subject": f"mate {i}", "prompt": f"Mate {i} is", "ground_truth": None} for i in range(40)]
    path = write(facts, "facts.json")
    build(tmp_path / "out", [Source("one-wording", None, path), Source("every-wording", None, path)])
    dataset = Dataset.load(tmp_path / "out")
    for split in SPLITS:
        narrow, wide = (dataset.records(split, [f"{one}-wording"]) for one in ("one", "every"))
        assert [one.prompt for one in narrow] == [one.prompt for one in wide] != []
        assert all(one.rephrases == ("The colour of tea is",) and not one.locality for one in wide)
        assert not any(one.rephrases for one in narrow)
        for one in narrow:
            kept = [(question.prompt, question.answer) for question in one.locality]
            # What the answer was is not known of every fact; there is nothing to keep then.
            assert kept == ([("The colour of tea is", "green")] if one.ground_truth else [])


def test_what_is_said_about_the_dataset(tmp_path, write, make_facts):
    path = write([*make_facts(50), *make_facts(2, target=""), *make_facts(3)])
    built = build(tmp_path / "out", [Source("people", None, path)], seed=5)
    info = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))
    assert built == {"out": str(tmp_path / "out"), **info}
    assert info["tasks"]["people"]["skipped"] == {"duplicate": 3, "empty target": 2}
    assert sum(info["tasks"]["people"][split] for split in SPLITS) == 50
    assert info["instructions"] == {"people": {"train": 24, "heldout": 5}}
    assert info["tasks"]["people"]["notes"]["without locality"] == 50
    assert (info["format_version"], info["seed"], info["limit"]) == (1, 5, None)
    assert info["sources"][0]["task"] == "people" and len(info["sources"][0]["sha256"]) == 64
    assert len(info["styles"]["people"]) == 5


def test_a_pinned_file_goes_whole_and_takes_its_subjects(tmp_path, write, make_facts):
    everything = write(make_facts(100), "all.json")
    exam = write(make_facts(20, rephrases=["The river there is the"], ground_truth="Ditch"), "exam.json")
    built = build(tmp_path / "out", [Source("people", None, everything), Source("people", "test", exam)])
    dataset = Dataset.load(tmp_path / "out")
    tested = dataset.records("test")
    assert {f"town {n}" for n in range(20)} <= subjects(dataset, "test")
    # Of a record that both files have, the pinned one stays.
    assert sum(bool(record.rephrases) for record in tested) == 20
    skipped = built["tasks"]["people"]["skipped"]
    assert skipped["subject in test file"] + skipped.get("duplicate", 0) == 20
    assert sum(built["tasks"]["people"][split] for split in SPLITS) == 100


def test_pinned_files_of_two_splits(tmp_path, write, make_facts):
    sources = [
        Source("people", "train", write(make_facts(10), "a.json")),
        Source("places", "test", write(make_facts(10, start=5), "b.json")),
        Source("general", "validation", write(make_facts(10, start=12), "c.json")),
    ]
    built = build(tmp_path / "out", sources)
    people = built["tasks"]["people"]
    assert [people[split] for split in SPLITS] == [5, 0, 0]
    assert people["skipped"] == {"subject in test file": 5}
    assert built["tasks"]["places"]["test"] == 10
    assert built["tasks"]["general"]["validation"] == 7
    Dataset.load(tmp_path / "out")


def test_the_same_seed_gives_the_same_bytes(tmp_path, write, make_facts):
    path = write(make_facts(60))
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        build(tmp_path / name, [Source("people", None, path)], seed=seed)
    first, again, other = (files(tmp_path / name) for name in "abc")
    assert first == again
    assert first["train.jsonl"] != other["train.jsonl"]


def test_more_sources_move_no_record(tmp_path, write, make_facts):
    first, second = write(make_facts(60), "a.json"), write(make_facts(60, start=60), "b.json")
    build(tmp_path / "one", [Source("people", None, first)])
    build(tmp_path / "two", [Source("places", None, second), Source("people", None, first)])
    one, two = Dataset.load(tmp_path / "one"), Dataset.load(tmp_path / "two")
    for split in SPLITS:
        assert subjects(one, split) <= subjects(two, split)


def test_ids_stay_unique_over_files_of_one_name(tmp_path, make_facts):
    sources = []
    for n, name in enumerate(("a", "b")):
        path = tmp_path / name / "same.json"
        path.parent.mkdir()
        path.write_text(json.dumps(make_facts(20, start=n * 20)), encoding="utf-8")
        sources.append(Source("people", None, path))
    build(tmp_path / "out", sources)
    dataset = Dataset.load(tmp_path / "out")
    assert len({record.id for split in SPLITS for record in dataset.records(split)}) == 40


@pytest.mark.parametrize("limit", [1, 3, 20, 1000])
def test_limit(tmp_path, write, make_facts, limit):
    path = write(make_facts(100))
    sources = [Source("people", None, path), Source("places", None, path)]
    built = build(tmp_path / "out", sources, limit=limit)
    for counts in built["tasks"].values():
        assert sum(counts[split] for split in SPLITS) == min(limit, 100)
        assert counts["skipped"].get("over the limit", 0) == 100 - min(limit, 100)
        if limit >= 3:
            assert min(counts[split] for split in SPLITS) >= 1


def test_a_limit_that_keeps_nothing_is_refused(tmp_path, write, make_facts):
    with pytest.raises(InputError, match="limit is 0"):
        build(tmp_path / "out", [Source("people", None, write(make_facts(5)))], limit=0)


def test_unknown_task(tmp_path, write, make_facts):
    with pytest.raises(InputError, match="unknown task 'counterfacts'") as error:
        build(tmp_path / "out", [Source("counterfacts", None, write(make_facts(5)))])
    assert "did you mean 'counterfact'?" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_own_templates(tmp_path, write, make_facts):
    folder = tmp_path / "templates"
    folder.mkdir()
    lines = ["task: rivers", "name: Rivers", "about: rivers of towns", "train:"]
    lines += [f"- 'Say {n} about {{{{ mood }}}}.'" for n in range(10)]
    lines += ["heldout:", *(f"- {{style: s{n}, text: Hold {n}.}}" for n in range(5))]
    (folder / "rivers.yaml").write_text("\n".join(lines), encoding="utf-8")
    good = write(make_facts(30, fields={"mood": "calm"}), "good.json")
    built = build(tmp_path / "out", [Source("rivers", None, good)], templates=folder)
    assert list(built["tasks"]) == ["rivers"]
    bad = write(make_facts(30), "bad.json")
    with pytest.raises(TemplateError, match=r"rivers\.yaml, field `train`, instruction 1: 'mood' is undefined"):
        build(tmp_path / "bad", [Source("rivers", None, bad)], templates=folder)
    assert not (tmp_path / "bad").exists()


def test_a_task_without_records_is_refused(tmp_path, write, make_facts):
    with pytest.raises(DataError, match=r"no record is left for the task 'people' \(empty target: 4\)"):
        build(tmp_path / "out", [Source("people", None, write(make_facts(4, target="")))])
    assert not (tmp_path / "out").exists()


def test_an_existing_dataset_needs_force(tmp_path, write, make_facts):
    out = tmp_path / "out"
    source = Source("people", None, write(make_facts(30)))
    build(out, [source])
    (out / "notes.txt").write_text("old", encoding="utf-8")
    before = files(out)
    with pytest.raises(InputError, match="exists") as error:
        build(out, [source], seed=1)
    assert "--force" in error.value.hint and files(out) == before
    build(out, [source], seed=1, force=True)
    assert set(files(out)) == {"train.jsonl", "validation.jsonl", "test.jsonl", "dataset.json", "templates.json"}
    assert files(out)["train.jsonl"] != before["train.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source.json"]


def test_force_replaces_nothing_but_a_dataset(tmp_path, write, make_facts):
    source = Source("people", None, write(make_facts(30)))
    for path in (tmp_path / "home", tmp_path / "file"):
        if path.name == "home":
            path.mkdir()
            (path / "precious.txt").write_text("mine", encoding="utf-8")
        else:
            path.write_text("mine", encoding="utf-8")
        with pytest.raises(InputError, match="is no dataset folder"):
            build(path, [source], force=True)
    assert (tmp_path / "home" / "precious.txt").read_text(encoding="utf-8") == "mine"


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path, write, make_facts):
    source = Source("people", None, write(make_facts(30)))
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty", [source])
    build(tmp_path / "a" / "b" / "c", [source])
    assert files(tmp_path / "empty") == files(tmp_path / "a" / "b" / "c")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_while_writing_leaves_no_trace(tmp_path, write, make_facts, monkeypatch, error, exists):
    out, source = tmp_path / "out", Source("people", None, write(make_facts(30)))
    if exists:
        build(out, [source])
    before = files(out) if exists else None

    def fail(folder, records):
        (folder / "train.jsonl").write_text("half", encoding="utf-8")
        raise error

    monkeypatch.setattr(build_module, "_write_records", fail)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        build(out, [source], force=True, seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out"] if exists else []) + ["source.json"]
    assert (files(out) if exists else None) == before


def test_a_failure_while_replacing_brings_the_old_one_back(tmp_path, write, make_facts, monkeypatch):
    out, source = tmp_path / "out", Source("people", None, write(make_facts(30)))
    build(out, [source])
    before, replace = files(out), os.replace

    def fail(old, new):
        if str(old).endswith(".new"):
            raise PermissionError(13, "Permission denied")
        replace(old, new)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        build(out, [source], force=True, seed=1)
    assert files(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source.json"]


def test_a_dataset_can_be_its_own_source(tmp_path, write, make_facts):
    out = tmp_path / "out"
    build(out, [Source("people", None, write(make_facts(40)))])
    n = len(Dataset.load(out).records("train"))
    built = build(out, [Source("people", "train", out / "train.jsonl")], force=True)
    assert built["tasks"]["people"]["train"] == n


def test_the_bundled_facts_make_the_default_dataset(tmp_path):
    built = build(tmp_path / "out")
    dataset = Dataset.load(tmp_path / "out")
    assert dataset.tasks == ("convsent", "general", "people", "places", "zsre")
    for counts in built["tasks"].values():
        assert min(counts[split] for split in SPLITS) > 0
    assert built["fingerprint"] == build(tmp_path / "again")["fingerprint"]
