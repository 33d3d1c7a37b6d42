"""One training run: its steps, its state between two of them, and its end.

Between two steps the state of a run is whole: there checkpoints are written, and there Ctrl-C and SIGTERM end it.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ie.base.model import Base
from ie.data.dataset import Dataset
from ie.data.record import SPLITS, Record
from ie.editor.editor import JOINT, Editor, EditorSettings
from ie.editor.files import save_editor
from ie.editor.passes import observe
from ie.editor.request import EditRequest
from ie.errors import BaseMismatchError, InputError
from ie.evaluation.instructions import heldout_instructions
from ie.evaluation.metrics import harmonic_mean, mean
from ie.evaluation.respondent import Respondent
from ie.evaluation.tuning import forced_figures
from ie.files import new_file
from ie.training.checkpoint import Checkpoint, write_checkpoint
from ie.training.config import CONFIG, config_text
from ie.training.distributed import Processes, share
from ie.training.episodes import Relations, consistent, draw_instruction, make_episodes
from ie.training.events import Event, OnEvent
from ie.training.loss import Loss, backward
from ie.training.memory import peak_memory_bytes
from ie.training.metrics import METRICS, Metrics
from ie.training.place import checkpoints, training_folder
from ie.training.settings import TrainSettings
from ie.training.stopping import deferred_signals
from ie.training.stream import RecordStream
from ie.training.validation import spread, validated
from ie.versions import versions

__all__ = ["Run"]

_CLIP_NORM = 1.0
_WARMUP_STEPS = 50
_STACK = 4  # edits that are in force together where they are stacked
_N_RECENT = 50  # steps that shown losses are a mean of


class Run:
    """One training run.

    Args:
        settings: of the run.
        base: the base model.
        dataset: what is trained on, and what the best editor is chosen on.
        tasks: the tasks of the dataset that are trained on.
        processes: that train together.
        on_event: called with progress.
    """

    def __init__(
        self,
        settings: TrainSettings,
        base: Base,
        dataset: Dataset,
        tasks: tuple[str, ...],
        processes: Processes,
        on_event: OnEvent,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.base, self.processes, self.on_event = settings, base, processes, on_event
        self.rng = random.Random(settings.seed)
        self.dataset, self.tasks = dataset, tasks
        records, validation, _ = (dataset.records(split, tasks) for split in SPLITS)
        self.stream = RecordStream(records, settings.balance, self.rng)
        self.relations = Relations(records) if settings.related_negatives else None
        self.validation = spread(validation, settings.n_validation, settings.seed)
        shape = EditorSettings.model_validate(settings, from_attributes=True)  # fields of the same names
        self.before = Respondent(base)
        self.editor = Editor(base.targets, shape.for_tasks(len(tasks))).to(base.device)
        logarithms = [*self.editor.log_rates.parameters(), *self.editor.log_regularisations.parameters()]
        self.optimiser = torch.optim.Adam(
            [
                {"params": list(self.editor.networks.parameters()), "lr": settings.learning_rate},
                {"params": logarithms, "lr": settings.rate_learning_rate},
            ],
            betas=(0.9, 0.99),
        )
        self.peaks = [group["lr"] for group in self.optimiser.param_groups]
        self.best: dict[str, Tensor] | None = None  # on validation records
        self.figures: dict[str, float] = {}
        self.best_score, self.best_step, self.n_stale, self.n_steps_done = -1.0, 0, 0, 0
        self.recent: list[list[float]] = []  # losses of edits and of what is to stay
        self.metrics: Metrics | None = None
        self.began = time.monotonic()
        self.elapsed = 0.0  # seconds up to the end of the last step, the same in all processes
        self.kept_at = self.began

    def open(self) -> None:
        """Make the run's folder, with its configuration and its file of figures."""
        if self.processes.is_first:
            folder = training_folder(self.settings.out)
            try:
                with new_file(folder / CONFIG) as fresh:
                    fresh.write_text(config_text(self.settings, versions()), encoding="utf-8")
                self.metrics = Metrics(folder, self.settings, self.n_steps_done, self._note)
            except OSError as error:
                raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error

    def steps(self) -> None:
        """Fit the normaliser, then take steps until they, the time, or the patience are used up."""
        with deferred_signals() as asked:
            if self.n_steps_done == 0:
                self._fit()
                self._validate()
            while self._progress() < 1 and not self._exhausted():
                loss = self._step()
                self.recent = [*self.recent[1 - _N_RECENT :], [loss.edit.item(), loss.locality.item()]]
                self.n_steps_done += 1
                self._report()
                if self.n_steps_done % self.settings.validate_every == 0:
                    self._validate()
                self.elapsed, stop = self.processes.largest(time.monotonic() - self.began, asked.is_set())
                if stop or self._checkpoint_is_due():
                    self._checkpoint()
                if stop:
                    raise KeyboardInterrupt
        if self.n_steps_done % self.settings.validate_every:
            self._validate()

    def _exhausted(self) -> bool:
        return self.settings.patience is not None and self.n_stale >= self.settings.patience

    def _progress(self) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        share = self.n_steps_done / self.settings.steps
        if self.settings.minutes is None:
            return share
        return max(share, self.elapsed / (60 * self.settings.minutes))

    def _checkpoint_is_due(self) -> bool:
        every = self.settings.checkpoint_every
        by_steps = every is not None and self.n_steps_done % every == 0
        return by_steps or time.monotonic() - self.kept_at >= 60 * self.settings.checkpoint_minutes

    def _checkpoint(self) -> None:
        """Write the state of the run; where that fails the run goes on, and the last good checkpoint is named."""
        if not self.processes.is_first:
            return
        folder = training_folder(self.settings.out)
        self.kept_at = time.monotonic()
        try:
            write_checkpoint(folder, Checkpoint(self.n_steps_done, self._tensors(), self._values()))
        except InputError as error:
            last = next(iter(checkpoints(folder)), None)
            self._note(f"{error.message}; the last good checkpoint is {last or 'none'}; training goes on")

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"editor/{name}": tensor for name, tensor in self.editor.state_dict().items()}
        found |= {f"best/{name}": tensor for name, tensor in (self.best or {}).items()}
        for name, parameter in self.editor.named_parameters():
            for key, tensor in self.optimiser.state[parameter].items():
                found[f"optimiser/{name}:{key}"] = tensor
        found["random/cpu"] = torch.get_rng_state()
        for name, store in self.base.stores.items():
            found |= {f"store/{name}/{key}": tensor for key, tensor in store.state().items()}
        return {name: tensor.detach().cpu() for name, tensor in found.items()}

    def _values(self) -> dict[str, Any]:
        return {
            "settings": self.settings.model_dump(mode="json"),
            "data": self.dataset.fingerprint,
            "base": {"id": self.base.id, "fingerprint": self.base.fingerprint},
            "dtype": str(self.base.model.dtype).removeprefix("torch."),
            "quant": self.base.quant,
            "elapsed": self.elapsed,
            "random": self.rng.getstate(),
            "stream": self.stream.state(),
            "best_score": self.best_score,
            "best_step": self.best_step,
            "figures": self.figures,
            "n_stale": self.n_stale,
            "recent": self.recent,
        }

    def load(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            BaseMismatchError: if it is a run's for another base model.
        """
        values = saved.values
        if values["base"]["fingerprint"] != self.base.fingerprint:
            raise BaseMismatchError(
                f"the run was begun for {values['base']['id']} (fingerprint {values['base']['fingerprint']}), "
                f"this base is {self.base.id} ({self.base.fingerprint})"
            )
        self.editor.load_state_dict(_below(saved.tensors, "editor/"))
        self.best = _below(saved.tensors, "best/") or None
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in _below(saved.tensors, "optimiser/").items():
            parameter, _, key = name.rpartition(":")
            moments.setdefault(parameter, {})[key] = tensor
        for name, one in self.editor.named_parameters():
            # Adam keeps its count of steps on the CPU, its moments beside the parameter.
            self.optimiser.state[one] = {
                key: tensor if key == "step" else tensor.to(one.device) for key, tensor in moments.get(name, {}).items()
            }
        torch.set_rng_state(saved.tensors["random/cpu"])
        for name, store in self.base.stores.items():
            store.load_state(_below(saved.tensors, f"store/{name}/"))
        version, inner, gauss = values["random"]
        self.rng.setstate((version, tuple(inner), gauss))
        self.stream.load_state(values["stream"])
        self.n_steps_done, self.recent, self.figures = saved.step, values["recent"], values["figures"]
        self.best_score, self.best_step = values["best_score"], values["best_step"]
        self.n_stale, self.elapsed = values["n_stale"], values["elapsed"]
        self.began = time.monotonic() - self.elapsed

    def _batch(self) -> list[Record]:
        return [next(self.stream) for _ in range(self.settings.batch_size)]

    def _fit(self) -> None:
        own = slice(self.processes.index, None, self.processes.n)
        for _ in range(-(-self.settings.n_fit // self.settings.batch_size)):
            observe(self.base, self.editor, [EditRequest.of(one, None) for one in self._batch()][own])
        if self.editor.kinds is not None:
            for kind, task in enumerate(self.tasks):
                records = self.rng.choices(self.dataset.records("train", (task,)), k=self.settings.n_fit)
                instructions = [draw_instruction(one, self.rng) for one in records]
                self.editor.kinds.observe(self.base.read(instructions[own]), kind)
        self.processes.add_up(self.editor.observed())
        self.editor.fit()

    def _step(self) -> Loss:
        warm = min(1.0, (self.n_steps_done + 1) / _WARMUP_STEPS)
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * warm * (1 - self._progress())
        batch, joint = self._batch(), self.editor.settings.method == JOINT
        episodes = make_episodes(
            batch,
            self.rng,
            negatives=self._batch() if joint else None,  # of a batch that is edited at once nothing is to stay
            relations=self.relations,
            told_share=0.0 if self.settings.method == "mend" else 1 - self.settings.instruction_dropout,
            plain_share=self.settings.plain_share,
            n_negatives=self.settings.n_negatives,
        )
        if joint:
            episodes = consistent(episodes, batch, 1)
        elif self.rng.random() < self.settings.stacked_share:
            n = self.processes.n
            n_stacks = -(-len(batch) // (_STACK * n)) * n  # as many in each process
            episodes = replace(consistent(episodes, batch, n_stacks), n_stacks=n_stacks)
        self.optimiser.zero_grad(set_to_none=True)
        own = share(episodes, self.processes)
        loss = backward(self.base, self.editor, own, self.settings.locality_weight, whole=episodes)
        self.processes.add_up_gradients(self.editor.parameters())
        self.processes.add_up([loss.edit, loss.locality])
        self.editor.clip_gradients(_CLIP_NORM)
        self.optimiser.step()
        return loss

    def _validate(self) -> None:
        """Compare the editor with the best so far, in the first process; the others learn how long none was better."""
        figures = self._compare() if self.processes.is_first else None
        if figures is not None:
            self._event("validation", figures, figures)
        self.n_stale = self.processes.from_first(self.n_stale)

    def _compare(self) -> dict[str, float] | None:
        """The editor's figures on validation records, if there are any; it is kept if they are the best so far."""
        if not self.validation:
            return None
        method = validated(self.editor, self.settings.batch_size)
        figures = forced_figures(self.base, method, self.validation, heldout_instructions(self.validation), self.before)
        score = harmonic_mean(list(figures.values()))
        if score > self.best_score:
            self.best_score, self.best_step, self.n_stale = score, self.n_steps_done, 0
            self.best, self.figures = copy.deepcopy(self.editor.state_dict()), figures
        else:
            self.n_stale += 1
        return figures

    def _report(self) -> None:
        seconds = time.monotonic() - self.began
        speed = {"episodes_per_second": self.n_steps_done * self.settings.batch_size / seconds}
        names = ("edit_loss", "locality_loss")
        shown = {name: mean([losses[i] for losses in self.recent]) for i, name in enumerate(names)}
        last = dict(zip(names, self.recent[-1], strict=True))
        last["learning_rate"] = self.optimiser.param_groups[0]["lr"]
        self._event("step", {**shown, **speed}, {**last, **speed})

    def _note(self, text: str) -> None:
        self.on_event(Event("note", text))

    def _event(
        self,
        kind: Literal["step", "validation", "done"],
        shown: Mapping[str, float],
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Show something, and add the figures to the file of figures if there are any."""
        seconds = time.monotonic() - self.began
        if self.metrics is not None and figures is not None:
            self.metrics.write(kind, self.n_steps_done, seconds, figures)
        done = self._progress()
        left = seconds * (1 - done) / done if done > 0 else None
        self.on_event(Event(kind, "", self.n_steps_done, self.settings.steps, dict(shown), seconds, left))

    def finish(self, *, early: bool = False) -> dict[str, Any]:
        """Write the best editor, or without validation the last, its configuration and figures beside it, and say how
        the run went. One that ends early may have compared nothing yet but the untrained editor.
        """
        if early and self.n_steps_done < self.settings.validate_every and self.processes.is_first:
            self._compare()
        seconds = time.monotonic() - self.began
        if self.best is not None:
            self.editor.load_state_dict(self.best)
        else:
            self.best_step = self.n_steps_done
        if self.processes.is_first:
            self._save(seconds)
        if self.metrics is not None:
            self.metrics.close()
        if self.processes.is_first and self.best_step < self.n_steps_done:
            self._note(
                f"none after step {self.best_step} was better on validation records: the editor of that step is written"
            )
        self._event("done", self.figures)
        n_episodes = self.n_steps_done * self.settings.batch_size
        kept = self.base.prefixes.store
        return {
            "editor": str(self.settings.out),
            "base": self.base.id,
            "tasks": list(self.tasks),
            "holdout": list(self.settings.holdout),
            "steps": self.n_steps_done,
            "best_step": self.best_step,
            "episodes": n_episodes,
            "seconds": seconds,
            "episodes_per_second": n_episodes / seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "prefix_kept": {"texts": len(kept), "memory_bytes": kept.n_bytes, "file_bytes": kept.n_file_bytes},
            "validation": self.figures,
        }

    def _save(self, seconds: float) -> None:
        folder = training_folder(self.settings.out)
        save_editor(
            self.settings.out,
            self.editor,
            self.base,
            tasks=self.tasks,
            holdout=self.settings.holdout,
            training={
                **self.settings.model_dump(mode="json", exclude={"out", "force", "resume"}),
                "data_fingerprint": self.dataset.fingerprint,
                "templates": self.dataset.info.get("templates"),
                "steps_done": self.n_steps_done,
                "seconds": round(seconds, 1),
            },
            validation=self.figures,
            beside=[folder / CONFIG, folder / METRICS],
        )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
