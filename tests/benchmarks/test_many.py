"""What is measured of many edits is what it says: single patches add up, and one update holds all edits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.many import draw, make, measure_size, patch_seconds, requests_of
from ie.base import Base
from ie.data.dataset import Dataset
from ie.editor import Editor, EditorSettings, save_editor
from ie.editor.methods import editor_method


def _editor(base: Base) -> Editor:
    torch.manual_seed(0)
    return Editor(base.targets, EditorSettings(rank=4, rate=0.1))


def test_a_stack_is_the_sum_of_single_edits(load: Callable[..., Base], dataset: Path) -> None:
    base = load("llama")
    editor = _editor(base)
    requests = requests_of(draw(Dataset.load(dataset), "test", 3))
    stacked = make("stack", base, editor, requests)
    alone = [editor_method(editor)(base, [request]) for request in requests]
    for name, (a, b) in stacked.items():
        total = sum(one[name][1][0].T @ one[name][0][0] for one in alone)
        assert isinstance(total, torch.Tensor)
        kept = 1 - ((b[0].T @ a[0] - total).norm() / total.norm()) ** 2
        assert kept > 0.99  # each patch keeps 99.9 % of its energy


def test_figures_of_a_size(load: Callable[..., Base], dataset: Path, tmp_path: Path) -> None:
    base = load("llama")
    save_editor(tmp_path, _editor(base), base, tasks=("people",), holdout=("zsre",), training={}, validation={})
    setting = {"regularisation": 1e9}
    found = measure_size("joint", base, tmp_path, dataset, 2, setting, generate=False)
    assert found["n"] == 2 and found["seconds_per_edit"] > 0 and found["peak_bytes"] >= found["peak_bytes_of_making"]
    timed = patch_seconds(base, tmp_path, Dataset.load(dataset), 2)
    assert timed["n"] == 2 and timed["share"] == timed["joint_s"] / timed["single_s"] > 0
    # So much regularisation changes nothing: the base of random weights knows no target and keeps every answer.
    assert (found["reliability_forced"], found["locality_forced"]) == (0.0, 1.0)
