"""What `ie train` can be told. The names are those of the flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

__all__ = ["TrainSettings"]

Share = Annotated[float, Field(ge=0, le=1)]


class TrainSettings(BaseModel):
    """Settings of one training run.

    Attributes:
        model: the base model: `toy`, a folder or a hub id.
        data: dataset folder.
        out: editor folder to write.
        tasks: tasks to train on; None for all of the dataset but the hold-outs.
        holdout: tasks that training never sees.
        quant: `auto`, `8bit`, `4bit` or `none`.
        dtype: `auto` or a dtype's name.
        device: `auto` or a torch device.
        device_map: `auto` spreads a base that no device holds over all of them; None for one device.
        method: `instructedit`; `mend`, which reads no instruction; or `instructedit-joint`, which asks each step's
            questions under all of its edits at once.
        steps: number of optimiser steps.
        minutes: end after this time, the learning rate's decay fitted to it; None for no bound.
        seed: of everything that is drawn.
        balance: draw tasks evenly; False draws them by size.
        force: start anew where an unfinished run for `out` has checkpoints.
        batch_size: edits in one step.
        rank: rank of the hypernetwork's layers; what a task's edits have of their own there has half of it.
        n_layers: number of its layers.
        rate: start of the learned rates of the update, of all passes together.
        opening_share: start of the rate of a prompt's last token, as a share of that.
        passes: gradients that an edit is made of in training, each on the model as edited so far (`ie.editor.passes`).
        n_whitened: principal directions of a module's inputs that an edit's keys are whitened along.
        learning_rate: of the hypernetwork (Adam).
        rate_learning_rate: of the rates' logarithms (Adam).
        locality_weight: weight of the locality loss, the edit loss having 1.
        n_negatives: other records' prompts that each edit must leave alone.
        related_negatives: let the first of them ask the same of another subject, where there is one.
        instruction_dropout: share of the edits made without their instruction, by what all tasks have in common.
        plain_share: share of the outer loss's edit and rephrase queries that carry no instruction.
        stacked_share: share of the steps whose queries are asked under the sum of four edits.
        validate_every: steps between validations.
        n_validation: records that validation looks at; 0 for none: the editor of the last step is kept.
        patience: validations without a better one after which training ends; None for no early stop.
        n_fit: edits that the normaliser is fitted on.
        checkpoint_every: steps between checkpoints; None for by time alone.
        checkpoint_minutes: the longest time between checkpoints.
        resume: go on from the last good checkpoint of an unfinished run for `out`.
        report_to: a tracker beside the JSONL file of figures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "toy"
    data: Path = Path("ie-data")
    out: Path = Path("ie-editor")
    tasks: tuple[str, ...] | None = None
    holdout: tuple[str, ...] = ("zsre",)
    quant: Literal["auto", "8bit", "4bit", "none"] = "auto"
    dtype: str = "auto"
    device: str = "auto"
    device_map: Literal["auto"] | None = None
    method: Literal["instructedit", "mend", "instructedit-joint"] = "instructedit"
    steps: PositiveInt = 150
    minutes: PositiveFloat | None = None
    seed: int = 0
    balance: bool = True
    force: bool = False
    batch_size: PositiveInt = 16
    rank: PositiveInt = 64
    n_layers: NonNegativeInt = 2
    rate: PositiveFloat = 4e-3
    opening_share: PositiveFloat = 0.1
    passes: PositiveInt = 2
    n_whitened: NonNegativeInt = 64
    learning_rate: PositiveFloat = 1.5e-3
    rate_learning_rate: PositiveFloat = 1e-2
    locality_weight: NonNegativeFloat = 0.5
    n_negatives: NonNegativeInt = 2
    related_negatives: bool = False
    instruction_dropout: Share = 0.25
    plain_share: Share = 0.9
    stacked_share: Share = 0.2
    validate_every: PositiveInt = 100
    n_validation: NonNegativeInt = 96
    patience: PositiveInt | None = 6
    n_fit: PositiveInt = 256
    checkpoint_every: PositiveInt | None = None
    checkpoint_minutes: PositiveFloat = 5.0
    resume: bool = False
    report_to: Literal["tensorboard", "wandb", "trackio"] | None = None
