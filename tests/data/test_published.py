"""The full published files, where they are: every input record becomes a record or is counted."""

from __future__ import annotations

import json

import pytest

from ie.data.build import Source, build
from ie.data.dataset import Dataset
from ie.data.layouts import read_source

# file: layout, input records, skipped
FILES = {
    "counterfact/counterfact-train.json": ("EasyEdit CounterFact", 10_000, {}),
    "counterfact/counterfact-val.json": ("EasyEdit CounterFact", 1_919, {}),
    "counterfact/counterfact_subject_replace.json": ("ROME", 213, {}),
    "knowedit/recent_train.json": ("KnowEdit", 570, {}),
    "knowedit/train_cf.json": ("KnowEdit", 1_428, {"target equals ground truth": 6}),
    "zsre/zsre_train_10000.json": ("ZsRE-MEND", 10_000, {"target equals ground truth": 246, "empty target": 35}),
    "zsre/ZsRE-test-first100.json": ("KnowEdit", 100, {"target equals ground truth": 8}),
    "zsre/zsre_mend_eval_portability_first100.json": ("ZsRE-MEND portability", 100, {}),
    "convsent/blender_val.json": ("ConvSent", 799, {}),
    "wikifactdiff/wfd-train.json": ("WikiFactDiff", 4_360, {}),
    "personality/train.json": ("personality", 1_600, {"no reply of 3 to 30 words": 42}),
}
TASKS = {
    "counterfact": ["counterfact/counterfact-train.json", "knowedit/train_cf.json"],
    "recent": ["knowedit/recent_train.json"],
    "zsre": ["zsre/zsre_train_10000.json"],
    "convsent": ["convsent/blender_val.json"],
    "wikifactdiff": ["wikifactdiff/wfd-train.json"],
    "personality": ["personality/train.json"],
}
EXAM = "zsre/zsre_mend_eval_portability_first100.json"


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_record_is_accounted_for(published_data, name):
    layout, n_input, skipped = FILES[name]
    result = read_source(published_data / name, "mine")
    assert result.layout == layout
    assert len(json.loads((published_data / name).read_text(encoding="utf-8"))) == n_input
    assert result.skipped == skipped
    assert len(result.records) + result.skipped.total() == n_input
    for record in result.records:
        assert record.target == record.target.strip() and record.target != record.ground_truth
        for question in record.locality + record.portability:
            assert "nq question:" not in question.prompt


def test_all_of_it_makes_one_dataset(published_data, tmp_path):
    sources = [Source(task, None, published_data / name) for task, names in TASKS.items() for name in names]
    built = build(tmp_path / "out", [*sources, Source("zsre", "test", published_data / EXAM)])
    dataset = Dataset.load(tmp_path / "out")  # refuses a subject in two splits
    assert dataset.tasks == tuple(sorted(TASKS))
    for task, names in TASKS.items():
        n_input = sum(FILES[name][1] for name in names) + (FILES[EXAM][1] if task == "zsre" else 0)
        counts = built["tasks"][task]
        n_kept = sum(counts[split] for split in ("train", "validation", "test"))
        assert n_kept + sum(counts["skipped"].values()) == n_input
