"""Training runs on a tiny base: repeatable, going down, ending when they should, leaving the best editor."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from ie.base import Base, load_base
from ie.data.dataset import Dataset
from ie.editor import Editor, load_editor
from ie.editor.files import load_info
from ie.editor.methods import editor_method, joint_update
from ie.editor.request import EditRequest
from ie.errors import IEError, InputError
from ie.evaluation.instructions import heldout_instructions
from ie.evaluation.metrics import harmonic_mean
from ie.evaluation.tuning import forced_figures
from ie.training import Event, TrainSettings, train, trainer
from ie.training import run as run_module
from ie.training.episodes import Episodes, make_episodes
from ie.training.loss import Loss
from ie.training.place import training_folder
from ie.training.validation import spread
from tests.dense import state_hash

Train = Callable[..., tuple[dict[str, Any], list[Event]]]


@pytest.fixture
def run(checkpoint: Callable[..., Path], dataset: Path, tmp_path: Path) -> Train:
    """Train on the tiny Llama; short texts (`mend`) and few records unless told otherwise."""

    def start(name: str = "editor", **changes: Any) -> tuple[dict[str, Any], list[Event]]:
        options: dict[str, Any] = {
            "model": str(checkpoint("llama")),
            "data": dataset,
            "out": tmp_path / name,
            "method": "mend",
            "device": "cpu",
            "steps": 3,
            "batch_size": 4,
            "rank": 8,
            "n_fit": 8,
            "n_validation": 4,
            "rate": 3e-3,
            "passes": 1,
        }
        events: list[Event] = []
        return train(TrainSettings.model_validate(options | changes), on_event=events.append), events

    return start


@pytest.fixture
def episodes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Episodes]]:
    """Watches what training draws: the tasks of each step's records, and the episodes made of them."""
    seen: list[tuple[list[str], Episodes]] = []

    def watch(records: Any, *args: Any, **options: Any) -> Episodes:
        made = make_episodes(records, *args, **options)
        seen.append(([record.task for record in records], made))
        return made

    monkeypatch.setattr(run_module, "make_episodes", watch)
    return seen


def test_the_same_seed_gives_the_same_editor_bit_for_bit(run: Train, tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        run(name, seed=seed, method="instructedit")
    one, two, other = ((tmp_path / name / "editor.safetensors").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other


@pytest.mark.slow
def test_the_loss_goes_down(run: Train) -> None:
    # One task: the size of a loss follows the length of its answers.
    how = {"tasks": ("people",), "patience": None, "validate_every": 60}
    _, events = run(steps=60, learning_rate=1e-2, rate_learning_rate=0.1, **how)
    means = [event.metrics["edit_loss"] for event in events if event.kind == "step"][:50]  # running means of up to 50
    sums = [mean * n for n, mean in enumerate(means, 1)]
    losses = [sums[0], *(right - left for left, right in itertools.pairwise(sums))]
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert last < 0.9 * first, (first, last)


def test_the_normalisers_are_fitted_once_and_never_move(run: Train, tmp_path: Path) -> None:
    for name, steps in (("start", 1), ("later", 8)):
        run(name, steps=steps, patience=None, validate_every=1, rate_learning_rate=0.3)
    start, later = (load_file(tmp_path / name / "editor.safetensors") for name in ("start", "later"))
    assert start.keys() == later.keys()
    fitted = [name for name in start if "normaliser" in name]
    assert len(fitted) == 2 * 2 * 6  # mean and deviation, of u and of delta, for each target
    assert all(start[name].equal(later[name]) for name in fitted)
    assert not all(start[name].eq(1).all() for name in fitted if name.endswith("std"))


def test_holdout_tasks_are_never_drawn(run: Train, episodes: list[tuple[list[str], Episodes]], tmp_path: Path) -> None:
    result, _ = run(steps=12, holdout=("zsre", "convsent"), tasks=("zsre", "people", "places"))
    assert {task for tasks, _ in episodes for task in tasks} == {"people", "places"}
    assert result["tasks"] == ["people", "places"] and result["holdout"] == ["zsre", "convsent"]
    info = load_info(tmp_path / "editor")
    assert info.tasks == ("people", "places") and info.holdout == ("zsre", "convsent")


def test_zsre_is_held_out_by_default(run: Train, episodes: list[tuple[list[str], Episodes]]) -> None:
    result, _ = run(steps=10)
    assert "zsre" not in {task for tasks, _ in episodes for task in tasks}
    assert result["tasks"] == ["convsent", "general", "people", "places"] and result["holdout"] == ["zsre"]


def test_tasks_are_drawn_evenly(run: Train, episodes: list[tuple[list[str], Episodes]]) -> None:
    run(steps=25, patience=None, validate_every=100, batch_size=8, n_negatives=0)
    drawn = Counter(task for tasks, _ in episodes for task in tasks)
    # 200 draws of four tasks: 50 each, four standard deviations are 25.
    assert set(drawn) == {"convsent", "general", "people", "places"}
    assert all(25 < n < 75 for n in drawn.values()), drawn


def test_mend_never_reads_an_instruction(run: Train, episodes: list[tuple[list[str], Episodes]]) -> None:
    run(steps=4, plain_share=0.0)
    assert {request.instruction for _, made in episodes for request in made.requests} == {None}
    assert {ask.instruction for _, made in episodes for ask in made.wanted + made.kept} == {None}


def test_instructedit_reads_training_instructions_alone(
    run: Train, episodes: list[tuple[list[str], Episodes]], dataset: Path
) -> None:
    run(steps=3, method="instructedit", plain_share=0.5, instruction_dropout=0.0)
    records = Dataset.load(dataset).records("train")
    training = {text for record in records for text in record.instruction.train}
    told = [request.instruction for _, made in episodes for request in made.requests]
    assert told and set(told) <= training


def test_a_share_of_edits_comes_without_its_instruction(run: Train, episodes: list[tuple[list[str], Episodes]]) -> None:
    for dropout, least, most in ((0.0, 0, 0), (0.5, 8, 28), (1.0, 36, 36)):
        episodes.clear()
        run(steps=3, batch_size=12, method="instructedit", instruction_dropout=dropout)
        untold = [request.instruction is None for _, made in episodes for request in made.requests]
        assert len(untold) == 36 and least <= sum(untold) <= most


def test_early_stop_ends(run: Train) -> None:
    result, events = run(steps=50, patience=2, validate_every=1, learning_rate=1e-12, rate_learning_rate=1e-12)
    assert result["steps"] == 2  # nothing moves, so nothing gets better
    assert sum(event.kind == "validation" for event in events) == 3
    assert result["best_step"] == 0 and "step 0 was better" in events[-2].text
    assert events[-1].kind == "done"


def test_without_patience_all_steps_are_taken(run: Train) -> None:
    assert run(steps=5, patience=None, validate_every=1, learning_rate=1e-12)[0]["steps"] == 5


def test_minutes_end_a_run(run: Train) -> None:
    result, _ = run(steps=100_000, minutes=0.02, n_validation=1)
    assert 0 < result["steps"] < 2000


def test_without_validation_the_last_editor_is_kept(run: Train) -> None:
    result, events = run(steps=3, n_validation=0, learning_rate=1e-12, rate_learning_rate=1e-12)
    assert result["best_step"] == 3 and result["validation"] == {}
    assert not any(event.kind == "validation" for event in events)


@pytest.mark.parametrize("options", [{"method": "instructedit-joint"}, {"stacked_share": 1.0}])
def test_no_step_asks_an_edit_to_stay_that_it_makes(
    run: Train, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    asked: list[Episodes] = []
    learn = run_module.backward

    def watch(base: Base, editor: Any, episodes: Episodes, *args: Any, **kwargs: Any) -> Loss:
        asked.append(episodes)
        return learn(base, editor, episodes, *args, **kwargs)

    monkeypatch.setattr(run_module, "backward", watch)
    run(steps=6, n_validation=0, **options)
    for made in asked:
        n_sums = made.n_stacks or 1
        wanted = {(ask.edit % n_sums, ask.prompt) for ask in made.wanted}
        assert made.kept and not {(ask.edit % n_sums, ask.prompt) for ask in made.kept} & wanted


def test_the_best_editor_is_what_is_saved(run: Train, tmp_path: Path, load: Callable[..., Base], dataset: Path) -> None:
    options = {"steps": 10, "validate_every": 2, "patience": None, "rate": 0.003, "n_validation": 8}
    result, events = run(rate_learning_rate=0.5, learning_rate=1e-2, **options)
    figures = [event.metrics for event in events if event.kind == "validation"]
    assert len(figures) == 6 and len({str(one) for one in figures}) > 1  # large steps: validations differ
    best = max(figures, key=lambda one: harmonic_mean(list(one.values())))
    info = load_info(tmp_path / "editor")
    assert dict(info.validation) == result["validation"] == best
    assert result["best_step"] == 2 * figures.index(best)
    base = load("llama")
    editor, _ = load_editor(tmp_path / "editor", base)
    tasks = ("convsent", "general", "people", "places")
    records = spread(Dataset.load(dataset).records("validation", tasks), 8, 0)
    again = forced_figures(base, editor_method(editor), records, heldout_instructions(records))
    assert again == pytest.approx(best)  # float


def test_an_interrupt_leaves_a_usable_editor_and_is_raised_again(
    checkpoint: Callable[..., Path], dataset: Path, tmp_path: Path, load: Callable[..., Base]
) -> None:
    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 2:
            raise KeyboardInterrupt

    settings = TrainSettings(
        model=str(checkpoint("llama")),
        data=dataset,
        out=tmp_path / "editor",
        method="mend",
        device="cpu",
        batch_size=4,
        rank=8,
        n_fit=8,
        n_validation=2,
    )
    with pytest.raises(KeyboardInterrupt):
        train(settings, on_event=stop)
    _, info = load_editor(tmp_path / "editor", load("llama"))
    assert info.training["steps_done"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["editor"]


@pytest.mark.parametrize("n_validation", [0, 2])
def test_an_early_interrupt_leaves_what_was_learned(
    checkpoint: Callable[..., Path],
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_validation: int,
) -> None:
    """Without validation the last editor; else that is compared first with the untrained one, here always better."""
    scores = itertools.count()
    monkeypatch.setattr(run_module, "harmonic_mean", lambda values: next(scores))
    rates: list[Tensor] = []

    def stop_at(step: int) -> Callable[[Event], None]:
        def watch(event: Event) -> None:
            assert event.kind != "validation" or n_validation
            if event.kind == "step" and event.step == step:
                raise KeyboardInterrupt

        return watch

    for step in (1, 3):
        settings = TrainSettings(
            model=str(checkpoint("llama")), data=dataset, out=tmp_path / str(step), device="cpu", batch_size=4, rank=8,
            n_fit=8, n_validation=n_validation, rate_learning_rate=0.1,
        )  # fmt: skip
        with pytest.raises(KeyboardInterrupt, match=f"the {'best' if n_validation else 'last'} editor so far"):
            train(settings, on_event=stop_at(step))
        weights = load_file(settings.out / "editor.safetensors")
        rates.append(torch.cat([weights[name].flatten() for name in sorted(weights) if "log_rates" in name]))
    assert not torch.equal(*rates)  # not what the run began with


def test_a_gradient_that_is_not_finite_leaves_the_best_editor(
    run: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    learn, n_steps = run_module.backward, itertools.count(1)

    def spoil(base: Base, editor: Editor, *args: Any, **kwargs: Any) -> Loss:
        loss = learn(base, editor, *args, **kwargs)
        if next(n_steps) == 3:
            next(one for one in editor.parameters() if one.grad is not None).grad.fill_(torch.nan)  # type: ignore[union-attr]
        return loss

    monkeypatch.setattr(run_module, "backward", spoil)
    with pytest.raises(IEError, match="not finite"):
        run(steps=5, n_validation=2)
    info = load_info(tmp_path / "editor")
    weights = load_file(tmp_path / "editor" / "editor.safetensors")
    assert info.training["steps_done"] == 2 and all(tensor.isfinite().all() for tensor in weights.values())


def test_what_fails_at_its_first_step_leaves_the_old_editor(
    run: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(steps=1)
    before = (tmp_path / "editor" / "editor.safetensors").read_bytes()

    def fail(*args: Any, **kwargs: Any) -> Loss:
        raise InputError("broken")

    monkeypatch.setattr(run_module, "backward", fail)
    with pytest.raises(InputError, match="broken"):
        run(steps=1, force=True, seed=1)
    assert (tmp_path / "editor" / "editor.safetensors").read_bytes() == before


def test_a_task_without_training_records_is_left_out(run: Train, dataset: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dataset, tmp_path / "data")
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(one for one in lines if '"task": "places"' not in one))
    result, events = run(data=folder, method="instructedit")
    assert result["tasks"] == ["convsent", "general", "people"]
    assert any("no training record of places: not trained on" in event.text for event in events)
    with pytest.raises(InputError, match="has no training record of places"):
        run(data=folder, tasks=("people", "places"))


def test_one_process_trains_an_editor(run: Train, tmp_path: Path) -> None:
    with FileLock(f"{training_folder(tmp_path / 'editor')}.lock"), pytest.raises(InputError, match="another process"):
        run(steps=1)
    assert run(steps=1)[0]["steps"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["editor"]


@pytest.mark.parametrize("name", ["plain_share", "instruction_dropout", "stacked_share"])
def test_a_share_is_one_at_most(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        TrainSettings.model_validate({name: 9})


def test_an_interrupt_before_there_is_an_editor_writes_nothing(
    checkpoint: Callable[..., Path], dataset: Path, tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TrainSettings(model=str(checkpoint("llama")), data=dataset, out=tmp_path / "editor"), on_event=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quant", ["none", "8bit", "4bit"])
def test_the_base_is_unchanged_bit_for_bit(run: Train, monkeypatch: pytest.MonkeyPatch, quant: str) -> None:
    seen: list[tuple[Base, str]] = []

    def watch(*args: Any, **options: Any) -> Base:
        base = load_base(*args, **options)
        seen.append((base, state_hash(base.model)))
        return base

    monkeypatch.setattr(trainer, "load_base", watch)
    result, _ = run(quant=quant, dtype="float32", steps=2)
    ((base, before),) = seen
    assert base.quant == quant and result["steps"] == 2
    assert state_hash(base.model) == before
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_what_a_run_says(run: Train, tmp_path: Path, load: Callable[..., Base]) -> None:
    result, events = run(steps=3)
    assert set(result) == {
        *("editor", "base", "tasks", "holdout", "steps", "best_step", "episodes", "seconds"),
        *("episodes_per_second", "peak_memory_bytes", "prefix_kept", "validation"),
    }
    kept = result["prefix_kept"]
    assert kept["texts"] > 0 and kept["memory_bytes"] > 0 and kept["file_bytes"] == 0
    assert result["episodes"] == 12 and result["editor"] == str(tmp_path / "editor")
    assert set(result["validation"]) == {"reliability", "generalization", "locality"}
    assert [event.step for event in events if event.kind == "step"] == [1, 2, 3]
    assert all(event.metrics["episodes_per_second"] > 0 for event in events if event.kind == "step")
    assert load_info(tmp_path / "editor").base.fingerprint == load("llama").fingerprint


def test_nothing_to_train_on_is_an_input_error(run: Train, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no training record"):
        run(tasks=("zsre",))
    with pytest.raises(InputError, match="no task 'unknown'"):
        run(tasks=("unknown",))
    assert not list(tmp_path.iterdir())


def test_a_joint_editor_learns_its_regularisation(
    run: Train, tmp_path: Path, load: Callable[..., Base], dataset: Path
) -> None:
    run(steps=3, method="instructedit-joint", n_validation=0, rate_learning_rate=0.3)
    editor, info = load_editor(tmp_path / "editor", load("llama"))
    learned = editor.regularisations()
    assert info.method == "instructedit-joint" and set(learned) == {target.name for target in editor.targets}
    moved = [abs(float(value.detach()) - 0.1) > 1e-4 for value in learned.values()]
    assert any(moved), learned
    base, requests = load("llama"), [EditRequest("The lighthouse of Orm was built by", "Edda Falk")]
    own, given = (joint_update(base, editor, requests, value) for value in (None, 0.1))
    assert any(not own[name][1].equal(given[name][1]) for name in own)
    alone = editor_method(editor)(base, requests)
    for name, (a, b) in own.items():
        # One edit's own least squares is the joint one of that edit: float64 solves, rounded to float32.
        torch.testing.assert_close(alone[name][1][0].T @ alone[name][0][0], b[0].T @ a[0], rtol=1e-4, atol=1e-7)
