"""A dataset folder: records in three splits and `dataset.json`, which says how they were made.

    train.jsonl  validation.jsonl  test.jsonl     one record a line
    dataset.json                                  format version, counts, seed, sources, fingerprints
    templates.json                                the instruction templates that it was built with

Invariants, checked when a folder is read: every line is a whole record, ids are unique, and no subject stands in two
splits, in whatever task. Lines may be written by hand: `task`, `subject`, `prompt` and `target` are enough.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonlines
from pydantic import ValidationError

from ie.data.record import SPLITS, Instructions, Record, Split
from ie.data.splits import normal_subject
from ie.data.templates import Template, fingerprint, load_templates, read_templates
from ie.errors import DataError, InputError, TemplateError

__all__ = [
    "FORMAT_VERSION",
    "INFO_FILE",
    "TEMPLATES_FILE",
    "Dataset",
    "did_you_mean",
    "parse_record",
    "read_lines",
    "split_file",
]

FORMAT_VERSION = 1
INFO_FILE, TEMPLATES_FILE = "dataset.json", "templates.json"
BUILD_HINT = "`ie build --out DIR` makes a dataset folder"
RECORD_HINT = (
    "a line is one JSON object with task, subject, prompt and target; optional: id, ground_truth, rephrases [text], "
    "locality and portability [{prompt, answer}], instruction, fields {name: text}"
)


@dataclass(frozen=True)
class Dataset:
    """The records of a dataset folder.

    Attributes:
        path: the folder.
        info: what its dataset.json says.
        fingerprint: a hash of the records as they are now, so it differs from `info["fingerprint"]` after a hand edit.
    """

    path: Path
    info: Mapping[str, Any]
    fingerprint: str
    _records: Mapping[Split, tuple[Record, ...]]

    @classmethod
    def load(cls, path: str | Path) -> Dataset:
        """Reads and checks a dataset folder.

        Args:
            path: the folder.

        Raises:
            DataError: a missing file, broken JSON, a wrong field or a subject in two splits; with file and line.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise DataError(f"no dataset folder at {folder}", hint=BUILD_HINT)
        info = _read_info(folder / INFO_FILE)
        records: dict[Split, tuple[Record, ...]] = {}
        digest = hashlib.sha256()
        for split in SPLITS:
            file = folder / split_file(split)
            records[split] = tuple(_records_of(file))
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        _check_ids(records)
        _check_subjects(records)
        return cls(folder, info, digest.hexdigest()[:16], records)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have records, sorted."""
        return tuple(sorted({record.task for records in self._records.values() for record in records}))

    def templates(self) -> dict[str, Template]:
        """The instruction templates that it was built with.

        Raises:
            TemplateError: they are not known: it was built by an earlier version, with templates of its own.
        """
        file = self.path / TEMPLATES_FILE
        found = read_templates(file) if file.exists() else load_templates()
        found = {task: found[task] for task in self.info.get("tasks", ()) if task in found}
        if fingerprint(found) != self.info.get("templates") or not found.keys() >= set(self.tasks):
            raise TemplateError(
                f"{self.path}: the templates that it was built with are not known", hint="build the dataset again"
            )
        return found

    def records(self, split: Split, tasks: Iterable[str] | None = None) -> list[Record]:
        """The records of one split.

        Args:
            split: train, validation or test.
            tasks: only these tasks; None for all.

        Raises:
            InputError: a split or a task that this dataset does not have.
        """
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}", hint=f"one of {', '.join(SPLITS)}")
        if tasks is None:
            return list(self._records[split])
        wanted = {tasks} if isinstance(tasks, str) else set(tasks)
        for task in sorted(wanted - set(self.tasks)):
            raise InputError(
                f"the dataset {self.path} has no task {task!r}",
                hint=f"{did_you_mean(task, self.tasks)}it has {', '.join(self.tasks)}",
            )
        return [record for record in self._records[split] if record.task in wanted]


def split_file(split: Split) -> str:
    """The name of a split's file."""
    return f"{split}.jsonl"


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """The beginning of a hint: the known name nearest to a wrong one, or nothing."""
    near = difflib.get_close_matches(wrong.casefold(), list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}? " if near else ""


def read_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The JSON objects of a JSONL file with their line numbers; empty lines are passed over.

    Raises:
        DataError: no such file, or a line that is no JSON object.
    """
    n = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for n, text in enumerate(file, start=1):
                if text.strip():
                    with jsonlines.Reader([text]) as reader:
                        yield n, reader.read(type=dict)
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}", hint="check the path") from error
    except (jsonlines.InvalidLineError, RecursionError) as error:
        problem = str(error).split(" (line")[0]
        raise DataError(f"{path}, line {n}: {problem}", hint=RECORD_HINT) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {n + 1} or after: not UTF-8 text", hint="save the file as UTF-8") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", hint="check the path and its permissions"
        ) from error


def parse_record(content: Mapping[str, Any], *, where: str, default_id: str, task: str | None = None) -> Record:
    """Turns one JSON object into a record.

    Args:
        content: the object; of its keys only subject, prompt and target must be there, and task if none is given.
        where: file and line, for the error.
        default_id: the id of a record that brings none.
        task: the record's task, whatever the object says; None to take the object's own.

    Raises:
        DataError: every missing, unknown and wrong field at once.
    """
    filled = {"id": default_id, **content}
    if task is not None:
        filled["task"] = task
    instruction = filled.get("instruction")
    if isinstance(instruction, Mapping):
        filled["instruction"] = _shared(instruction)
    try:
        return Record.model_validate(filled)
    except ValidationError as error:
        problems = "; ".join(_explain(problem) for problem in error.errors())
        raise DataError(f"{where}: {problems}", hint=RECORD_HINT) from error


def _explain(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    reasons = {"missing": "missing", "extra_forbidden": "unknown field", "string_too_short": "empty"}
    return f"field `{field}`: {reasons.get(problem['type'], problem['msg'])}"


def _shared(instruction: Mapping[str, Any]) -> Instructions | Mapping[str, Any]:
    """Instructions as one object for all records that carry the same ones: they are most of a file's text."""
    groups = [instruction.get("train", ()), instruction.get("heldout", ())]
    if set(instruction) <= {"train", "heldout"} and all(_is_texts(group) for group in groups):
        return _instructions(tuple(groups[0]), tuple(groups[1]))
    return instruction


def _is_texts(group: object) -> bool:
    return isinstance(group, Sequence) and not isinstance(group, str) and all(isinstance(text, str) for text in group)


@lru_cache(maxsize=4096)
def _instructions(train: tuple[str, ...], heldout: tuple[str, ...]) -> Instructions:
    return Instructions(train=train, heldout=heldout)


def _records_of(file: Path) -> Iterator[Record]:
    for n, content in read_lines(file):
        yield parse_record(content, where=f"{file}, line {n}", default_id=f"{file.stem}-{n}")


def _read_info(file: Path) -> Mapping[str, Any]:
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{file.parent} is no dataset folder: it has no {INFO_FILE}", hint=BUILD_HINT) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: broken JSON: {error.msg}", hint=BUILD_HINT) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}", hint=BUILD_HINT) from error
    version = info.get("format_version") if isinstance(info, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DataError(f"{file}: no format_version", hint=BUILD_HINT)
    if version > FORMAT_VERSION:
        raise DataError(
            f"{file}: dataset format {version}, this version of ie reads up to {FORMAT_VERSION}",
            hint="upgrade ie, or build the dataset again",
        )
    return dict(info)


def _check_ids(records: Mapping[Split, Sequence[Record]]) -> None:
    seen: dict[str, Split] = {}
    for split in SPLITS:
        for record in records[split]:
            if record.id in seen:
                raise DataError(
                    f"the id {record.id!r} stands twice, in {split_file(seen[record.id])} and {split_file(split)}",
                    hint="ids are unique in a dataset; leave `id` out to have one filled in",
                )
            seen[record.id] = split


def _check_subjects(records: Mapping[Split, Sequence[Record]]) -> None:
    home: dict[str, Split] = {}
    for split in SPLITS:
        for record in records[split]:
            first = home.setdefault(normal_subject(record.subject), split)
            if first != split:
                raise DataError(
                    f"the subject {record.subject!r} stands in two splits, {first} and {split} (record {record.id!r})",
                    hint="a subject belongs to one split, or the test measures memory; move or drop these records",
                )
