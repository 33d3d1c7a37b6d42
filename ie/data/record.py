"""The record: one fact to change, with the questions that show whether the change is right.

A target is a continuation: the text that is read is `prompt + " " + target`, so neither prompt nor target carries the
space between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

__all__ = ["SPLITS", "Question", "Record", "Split", "Stripped"]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Stripped = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Question(BaseModel):
    """A prompt and the answer that the right model gives to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Stripped
    answer: Stripped


class Instructions(BaseModel):
    """Rendered instructions: a training record carries `train`, any other record carries `heldout`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()


class Record(BaseModel):
    """One fact to change; a line of a dataset file.

    `locality` questions must keep their answers after the edit, `portability` questions follow from the new fact and
    carry the answer that is right after it. `fields` holds what a template may name beyond the record's own fields
    (`label`, `topic`) and, for opinion tasks, the replies of both sides (`wanted`, `unwanted`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Stripped
    task: Stripped
    subject: Stripped
    prompt: Stripped
    target: Stripped
    ground_truth: Stripped | None = None
    rephrases: tuple[Stripped, ...] = ()
    locality: tuple[Question, ...] = ()
    portability: tuple[Question, ...] = ()
    instruction: Instructions = Instructions()
    fields: Mapping[str, str | Sequence[str]] = Field(default_factory=dict)
