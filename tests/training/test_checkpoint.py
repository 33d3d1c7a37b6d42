"""A run that is interrupted in any way goes on as if nothing had happened; what cannot be used is named."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ie.cli.app import app
from typer.testing import CliRunner

from benchmarks.survival import survive
from ie.base import Base, load_base
from ie.base.store import TextStore
from ie.data.dataset import Dataset
from ie.data.tokens import Text
from ie.errors import BaseMismatchError, InputError
from ie.training import Event, TrainSettings, train
from ie.training.checkpoint import Checkpoint, newest_checkpoint, write_checkpoint
from ie.training.place import checkpoints, training_folder
from ie.training.stream import RecordStream
from tests.disk import limitable_disk

STEPS = 9


@pytest.fixture
def settings(checkpoint: Callable[..., Path], dataset: Path, tmp_path: Path) -> Callable[..., TrainSettings]:
    def make(name: str = "editor", **changes: Any) -> TrainSettings:
        options: dict[str, Any] = {
            "model": str(checkpoint("llama")), "data": dataset, "out": tmp_path / name, "device": "cpu",
            "steps": STEPS, "batch_size": 4, "rank": 8, "n_fit": 8, "n_validation": 4, "rate": 3e-3, "passes": 1,
            "validate_every": 2, "patience": None, "checkpoint_every": 1, "rate_learning_rate": 0.3,
        }  # fmt: skip
        return TrainSettings.model_validate(options | changes)

    return make


def kill_at(step: int, *, by: int = signal.SIGINT) -> Callable[[Event], None]:
    """Send this process a signal when a step is reported."""

    def watch(event: Event) -> None:
        if event.kind == "step" and event.step == step:
            os.kill(os.getpid(), by)

    return watch


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Handlers of SIGINT and SIGTERM that a suite run in the background of a shell would not have."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def weights(settings: TrainSettings) -> bytes:
    return (settings.out / "editor.safetensors").read_bytes()


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_resumed_run_ends_as_an_undisturbed_one(
    settings: Callable[..., TrainSettings], own_handlers: None, by: int
) -> None:
    whole = settings("whole", checkpoint_every=None)
    train(whole)
    parts = settings("parts", checkpoint_every=None)  # the signal alone makes the checkpoint
    for step in (1, 4):
        with pytest.raises(KeyboardInterrupt, match="ie train --resume"):
            train(parts.model_copy(update={"resume": step > 1}), on_event=kill_at(step, by=by))
        assert checkpoints(training_folder(parts.out))[0].name == f"checkpoint-000000{step}"
        assert (parts.out / "editor.safetensors").is_file()  # the best so far
    result = train(parts.model_copy(update={"resume": True}))
    assert result["steps"] == STEPS
    assert weights(parts) == weights(whole)
    assert not training_folder(parts.out).exists()
    lines = [
        [json.loads(line) for line in (one.out / "metrics.jsonl").read_text().splitlines()] for one in (whole, parts)
    ]
    kept = [[(one["kind"], one["step"], one.get("edit_loss")) for one in file] for file in lines]
    assert kept[0] == kept[1] and len(kept[0]) == STEPS + 6


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, dataset: Path) -> None:
    found = survive(tmp_path, dataset, n_kills=2, steps=20, span=1.5, seed=3)
    assert found["bitwise_equal"] and not found["unreadable"] and any(found["checkpoint_after_each_kill"]), found


@pytest.mark.slow
def test_sigterm_ends_a_process_that_can_be_resumed(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quick.yaml").write_text("n_validation: 4\nn_fit: 8\nrank: 8\nbatch-size: 4\n")
    args = ["train", "--data", dataset, "--out", tmp_path / "editor", "--config", tmp_path / "quick.yaml"]
    command = [sys.executable, "-m", "ie.cli", *map(str, args)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "validation" in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130, rest
    assert f"`ie train --resume --out {tmp_path / 'editor'}` goes on" in rest
    saved = newest_checkpoint(training_folder(tmp_path / "editor"), pytest.fail)
    assert saved is not None
    monkeypatch.chdir(tmp_path)
    args = ["train", "--out", "editor", "--resume", "--json"]
    refused = CliRunner().invoke(app, [*args, "--seed", "7"])
    assert refused.exit_code == 2 and "has seed 0, not 7" in refused.stderr
    done = CliRunner().invoke(app, [*args, "--steps", str(saved.step + 1)])  # all else as the run was begun
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"] == saved.step + 1
    nothing = CliRunner().invoke(app, args)
    assert nothing.exit_code == 2 and "editor is finished" in nothing.stderr


def test_a_run_goes_on_with_the_base_as_it_was_loaded(
    settings: Callable[..., TrainSettings], own_handlers: None
) -> None:
    """`auto` is 8 bits where there is a GPU."""
    one = settings(n_validation=0)
    with pytest.raises(KeyboardInterrupt):
        train(one, on_event=kill_at(2))
    state = checkpoints(training_folder(one.out))[0] / "state.json"
    document = json.loads(state.read_text())
    assert document["values"]["quant"] == "none"
    document["values"]["quant"] = "8bit"
    state.write_text(json.dumps(document))
    train(one.model_copy(update={"resume": True}))
    assert json.loads((one.out / "editor.json").read_text())["base"]["quant"] == "8bit"


@pytest.mark.parametrize("damage", ["cut", "changed", "no tensors", "no json", "half json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    settings: Callable[..., TrainSettings], own_handlers: None, damage: str
) -> None:
    one = settings(checkpoint_every=2, steps=5)
    with pytest.raises(KeyboardInterrupt):
        train(one, on_event=kill_at(3))
    newest, before = checkpoints(training_folder(one.out))
    tensors, values = newest / "state.safetensors", newest / "state.json"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-8])
    elif damage == "changed":
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x01")
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "no json":
        values.unlink()
    else:
        values.write_text(values.read_text()[:100])
    notes: list[str] = []
    train(one.model_copy(update={"resume": True}), on_event=lambda event: notes.append(event.text))
    assert any(str(newest) in note and "cannot be used" in note for note in notes)
    assert f"going on from step {int(before.name[-7:])}" in notes


def test_when_no_checkpoint_is_good_that_is_an_error(
    settings: Callable[..., TrainSettings], own_handlers: None
) -> None:
    one = settings(checkpoint_every=None)
    with pytest.raises(KeyboardInterrupt):
        train(one, on_event=kill_at(1))
    (only,) = checkpoints(training_folder(one.out))
    (only / "state.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be used"):
        train(one.model_copy(update={"resume": True}))
    assert only.exists()


def test_a_full_disk_loses_nothing(settings: Callable[..., TrainSettings], own_handlers: None) -> None:
    """Files beyond a size that the first checkpoints keep cannot be written, as on a full disk."""
    one = settings(steps=6)
    notes: list[str] = []

    def watch(event: Event) -> None:
        notes.append(event.text)
        if event.kind == "step" and event.step in limits:
            limit(limits[event.step])

    limits = {3: 1000, 5: None}
    with limitable_disk() as limit:
        train(one, on_event=watch)
    failed = [note for note in notes if "the last good checkpoint is" in note]
    assert len(failed) == 2 and all("checkpoint-0000002;" in note for note in failed), notes
    train(settings("undisturbed", steps=6))
    assert weights(one) == weights(settings("undisturbed"))


def test_half_a_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, Checkpoint(step, {"x": torch.full((3,), float(step))}, {"step": step}))
    assert [one.name for one in checkpoints(tmp_path)] == ["checkpoint-0000003", "checkpoint-0000002"]
    shutil.copytree(tmp_path / "checkpoint-0000003", tmp_path / ".checkpoint-0000004.0123abcd.new")
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None and found.step == 3 and found.tensors["x"].tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"rank": 4}, "rank 8, not 4"), ({"batch_size": 2, "seed": 1}, "seed 0, not 1; batch_size 4, not 2")],
)
def test_a_run_cannot_go_on_as_another(
    settings: Callable[..., TrainSettings], own_handlers: None, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(settings(), on_event=kill_at(1))
    with pytest.raises(InputError, match=said):
        train(settings(resume=True, **changes))


def test_a_run_cannot_go_on_with_other_weights_or_records(
    settings: Callable[..., TrainSettings],
    own_handlers: None,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    dataset: Path,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(settings(), on_event=kill_at(1))
    with pytest.raises(BaseMismatchError):
        train(settings(resume=True, model=str(checkpoint("llama", 1))))
    shutil.copytree(dataset, tmp_path / "data")
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data" / "train.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(InputError, match="records"):
        train(settings(resume=True, data=tmp_path / "data"))


def test_an_unfinished_run_is_not_overwritten(settings: Callable[..., TrainSettings], own_handlers: None) -> None:
    one = settings(steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(one, on_event=kill_at(1))
    shutil.rmtree(one.out)
    with pytest.raises(InputError, match="unfinished"):
        train(one)
    train(one.model_copy(update={"force": True}))
    with pytest.raises(InputError, match="finished"):
        train(one.model_copy(update={"resume": True}))


def test_a_second_ctrl_c_ends_at_once(settings: Callable[..., TrainSettings], own_handlers: None) -> None:
    def twice(event: Event) -> None:
        if event.kind == "step" and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second signal was not heeded")

    with pytest.raises(KeyboardInterrupt):
        train(settings(checkpoint_every=None), on_event=twice)


def test_a_stream_goes_on_where_it_was(dataset: Path) -> None:
    records = Dataset.load(dataset).records("train")
    rng = random.Random(1)
    stream = RecordStream(records, False, rng)
    for _ in range(137):
        next(stream)
    saved = json.loads(json.dumps([rng.getstate(), stream.state()]))
    expected = [next(stream).id for _ in range(300)]
    other = random.Random(2)
    version, inner, gauss = saved[0]
    other.setstate((version, tuple(inner), gauss))
    again = RecordStream(records, False, other)
    again.load_state(saved[1])
    assert [next(again).id for _ in range(300)] == expected


def test_a_store_gives_again_what_it_gave(load: Callable[..., Base]) -> None:
    """Hidden states differ, in their last bits, by the texts they were computed with; after a load they don't."""
    base = load("gpt2")
    texts = [base.encode(f"The river {'of the old town ' * n}is", "the Ombe") for n in range(8)]
    fresh = [load_base(base.id, device="cpu") for _ in range(3)]
    first, again, alone = (one.prefixes for one in fresh)
    batches = [[texts[0], texts[7], texts[3]], [texts[3], texts[5], texts[1]], [texts[6]]]
    for batch in batches:
        first.hidden(base.collate(batch))
    state = first.store.state()
    again.store.load_state(state)
    assert len(again.store) == len(first.store) == 6 and again.store.n_bytes == first.store.n_bytes
    orders = [[texts[1], texts[4]], [texts[7]], [texts[6], texts[2]], [texts[3], texts[0]], [texts[4]]]
    differs = False
    for batch in orders:
        wanted = first.hidden(base.collate(batch))
        assert again.hidden(base.collate(batch)).equal(wanted)
        differs |= not alone.hidden(base.collate(batch)).equal(wanted)
    assert differs  # or this test shows nothing
    assert all(value.equal(again.store.state()[key]) for key, value in first.store.state().items())


def test_a_store_keeps_no_more_after_a_load_than_before() -> None:
    texts = [Text((n, n + 1), 0, 1) for n in range(6)]
    asked: list[list[Text]] = []

    def compute(new: list[Text]) -> list[torch.Tensor]:
        asked.append(new)
        return [torch.tensor([text.ids[0], len(new)]) for text in new]

    store = TextStore(3 * 16)  # bytes of three texts
    for batch in (texts[:2], texts[2:4], texts[4:]):
        store.get(batch, compute)
    assert (len(store), store.n_bytes) == (3, 48)
    again = TextStore(3 * 16)
    again.load_state(store.state())
    asked.clear()
    assert [one.tolist() for one in again.get([texts[2]], compute)] == [[2, 2]] and asked == [texts[2:4]]
    assert [one.tolist() for one in again.get([texts[3]], compute)] == [[3, 1]]  # was never kept
    assert (len(again), again.n_bytes) == (3, 48)


def test_what_a_run_uses_without_a_checkpoint_is_gone_after_it(settings: Callable[..., TrainSettings]) -> None:
    one = settings(checkpoint_every=1, steps=2)
    train(one)
    assert {path.name for path in one.out.iterdir()} == {
        "editor.safetensors",
        "editor.json",
        "config.yaml",
        "metrics.jsonl",
    }
    assert not training_folder(one.out).exists()
    assert subprocess.run(
        [sys.executable, "-m", "ie.cli", "inspect", str(one.out)], capture_output=True, check=True
    ).stdout
