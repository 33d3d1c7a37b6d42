"""Several processes train the editor that one would train: real ones, joined by gloo."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ie.base import Base
from ie.data.dataset import Dataset
from ie.editor import Editor, EditorSettings
from ie.errors import InputError
from ie.training import TrainSettings, train
from ie.training.distributed import Processes, joined, share
from ie.training.episodes import Relations, make_episodes
from ie.training.loss import backward

OPTIONS = {"steps": 8, "batch_size": 5, "rank": 8, "n_fit": 10, "learning_rate": 1e-2, "patience": None}
OPTIONS |= {"seed": 1}  # with seed 0 one bias' gradient cancels out, and Adam makes a step of what rounding leaves


@pytest.mark.slow
def test_two_processes_train_the_editor_of_one(checkpoint: Callable[..., Path], dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    (data / "validation.jsonl").write_text("")  # so that the last editor is the best one
    fixed = {"model": str(checkpoint("llama")), "data": str(data), "device": "cpu", "dtype": "float32"}
    (tmp_path / "c.yaml").write_text(json.dumps(OPTIONS | fixed))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ie.cli"]
    command += [
        "train",
        "--out",
        str(tmp_path / "two"),
        "--config",
        str(tmp_path / "c.yaml"),
        "--json",
        "--minutes",
        "9",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 8  # one object: the other process is silent
    assert done.stderr.count("base ") == 1
    train(TrainSettings.model_validate(OPTIONS | fixed | {"out": tmp_path / "one"}))
    one = load_file(tmp_path / "one" / "editor.safetensors")
    other = load_file(tmp_path / "two" / "editor.safetensors")
    for name, tensor in one.items():
        pair = [other[name], tensor]
        if name.endswith("directions"):  # equal eigenvalues: any basis of their space will do
            pair = [rows.T @ rows for rows in pair]
        if name.endswith("places"):  # along any of these bases
            pair = [torch.cdist(rows, rows) for rows in pair]
        # Of directions in deviations within a kind products are some thousand, sums of float32 in another order.
        size = pair[1].abs().max().item() if name.startswith("kinds.") else 1.0
        torch.testing.assert_close(*pair, atol=1e-5 * size, rtol=1e-5, msg=name)
    moved = [tensor for name, tensor in one.items() if name.endswith(".up")]
    assert all(tensor.abs().max() > 1e-3 for tensor in moved)  # U starts at zero


def test_shares_of_a_batch_add_up_to_its_gradient(load: Callable[..., Base], dataset: Path) -> None:
    """Also where one share has more queries than another."""
    base = load("gpt2")
    records = [one for one in Dataset.load(dataset).records("train") if one.task != "zsre"][:20:4]
    whole = make_episodes(
        records, random.Random(0), relations=Relations(records), told_share=1.0, plain_share=0.5, n_negatives=2
    )
    editor = Editor(base.targets, EditorSettings(rate=0.1, rank=4))
    losses = [backward(base, editor, share(whole, Processes(index, 2)), 0.5, whole) for index in (0, 1)]
    halves = [parameter.grad for parameter in editor.parameters()]
    editor.zero_grad()
    loss = backward(base, editor, whole, 0.5)
    torch.testing.assert_close(sum(one.edit for one in losses), loss.edit, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sum(one.locality for one in losses), loss.locality, atol=1e-6, rtol=1e-4)
    for half, parameter in zip(halves, editor.parameters(), strict=True):
        torch.testing.assert_close(half, parameter.grad, atol=1e-5, rtol=1e-4)  # fp32 sums in another order
    sizes = [len(share(whole, Processes(index, 2)).kept) for index in (0, 1)]
    assert sum(sizes) == len(whole.kept) and sizes[0] != sizes[1]


def test_one_process_needs_no_launcher() -> None:
    with joined("cpu") as alone:
        assert alone == Processes() and alone.is_first
        assert alone.largest(1.5, True) == [1.5, True] and alone.from_first("x") == "x"


def test_a_base_spread_over_all_devices_gets_the_same_editor(
    checkpoint: Callable[..., Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with one device accelerate puts all of it there: the way there is what is tested."""
    asked_for: list[Any] = []
    load = AutoModelForCausalLM.from_pretrained

    def watch(*args: Any, **options: Any) -> Any:
        asked_for.append(options["device_map"])
        return load(*args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watch)
    fixed = {"model": str(checkpoint("llama")), "data": dataset, "dtype": "float32", "device": "cpu", "n_validation": 2}
    for name, device_map in (("one", None), ("spread", "auto")):
        train(TrainSettings.model_validate(OPTIONS | fixed | {"out": tmp_path / name, "device_map": device_map}))
    one, spread = ((tmp_path / name / "editor.safetensors").read_bytes() for name in ("one", "spread"))
    assert one == spread and asked_for == [{"": torch.device("cpu")}, "auto"]


def test_what_several_processes_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="cannot be shared"), joined("cuda:1"):
        pass
