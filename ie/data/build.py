"""Building a dataset folder: records from sources, split by subject, with instructions from templates.

    sources ──► records ──► split by subject ──► duplicates out ──► limit ──► instructions ──► folder

Every input record ends up in a split or is counted under a reason. Everything is read, checked and filled before the
first byte is written, and the folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonlines

from ie.data.dataset import FORMAT_VERSION, INFO_FILE, TEMPLATES_FILE, did_you_mean, split_file
from ie.data.record import SPLITS, Instructions, Question, Record, Split
from ie.data.splits import normal_subject, quotas, rank, split_of
from ie.data.templates import Template, fingerprint, load_templates, templates_text
from ie.errors import DataError, InputError
from ie.files import new_folder

__all__ = ["Source", "build"]

SOURCE_FORM = "TASK=FILE or TASK:SPLIT=FILE, for example zsre:test=zsre_eval.json"
# A subject of several pinned files belongs to the first of these: what is tested must not be trained on.
PRECEDENCE: tuple[Split, ...] = ("test", "validation", "train")


@dataclass(frozen=True)
class Source:
    """A file of records, the task that they are for, and the split that all of them go to (None: by subject)."""

    task: str
    split: Split | None
    path: Path

    @classmethod
    def parse(cls, text: str) -> Source:
        """Reads `TASK[:SPLIT]=FILE`.

        Raises:
            InputError: not of that form, or an unknown split.
        """
        name, equals, path = text.partition("=")
        task, colon, split = (part.strip() for part in name.partition(":"))
        if not equals or not task or not path.strip() or (colon and not split):
            raise InputError(f"not a source: {text!r}", hint=f"expected {SOURCE_FORM}")
        if not split:
            return cls(task, None, Path(path.strip()))
        for known in SPLITS:
            if split == known:
                return cls(task, known, Path(path.strip()))
        raise InputError(
            f"unknown split {split!r} in the source {text!r}",
            hint=f"{did_you_mean(split, SPLITS)}a split is one of {', '.join(SPLITS)}",
        )


@dataclass(frozen=True)
class _Found:
    """A record as a source gave it, with the split that the source is pinned to."""

    record: Record
    pinned: Split | None


Skipped = defaultdict[str, Counter[str]]


def build(
    out: str | Path,
    sources: Sequence[Source] = (),
    templates: str | Path | None = None,
    seed: int = 0,
    limit: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Builds a dataset folder.

    Args:
        out: the folder to write.
        sources: published files or own JSONL; none for the bundled facts.
        templates: a folder of templates; None for the bundled ones.
        seed: decides which subject goes to which split, and which records a limit keeps.
        limit: at most so many records of each task.
        force: replace a dataset that is there already.

    Returns:
        What dataset.json says, and `out`.

    Raises:
        InputError: an unknown task, a source or a template that cannot be used, or something at `out` already.
    """
    target = Path(out)
    _check_out(target, force)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1", hint="leave it out to keep every record")
    loaded = load_templates(templates)
    skipped: Skipped = defaultdict(Counter)
    found, described = _read(sources, loaded, skipped)
    placed = _limited(_placed(found, seed, skipped), limit, seed, skipped)
    _check_left(described, placed, skipped)
    finished = {split: [_instructed(record, loaded, split) for record in placed[split]] for split in SPLITS}
    info = _describe(finished, skipped, loaded, described)
    with new_folder(target) as folder:
        info["fingerprint"] = _write_records(folder, finished)
        info.update(seed=seed, limit=limit)
        used = {task: loaded[task] for task in info["tasks"]}
        (folder / TEMPLATES_FILE).write_text(templates_text(used) + "\n", encoding="utf-8")
        (folder / INFO_FILE).write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {"out": str(target), **info}


def _check_out(out: Path, force: bool) -> None:
    """Refuses to overwrite, and even with force to replace anything but a dataset."""
    if out.is_symlink() and not out.exists():
        raise InputError(f"{out} is a link to nothing", hint="remove it, or choose another folder with --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not (out / INFO_FILE).is_file():
        raise InputError(f"{out} exists and is no dataset folder", hint="choose another folder with --out")
    if not force:
        raise InputError(f"{out} exists", hint="--force replaces it, --out DIR writes elsewhere")


def _read(
    sources: Sequence[Source], templates: Mapping[str, Template], skipped: Skipped
) -> tuple[list[_Found], list[dict[str, Any]]]:
    """All records of all sources, those of pinned sources first, and a description of the sources."""
    if not sources:
        from ie.data.bundled import bundled_records

        records = bundled_records()
        tasks = sorted({record.task for record in records})
        for task in tasks:
            _check_task(task, templates)
        return [_Found(record, None) for record in records], [
            {"task": task, "split": None, "file": "bundled"} for task in tasks
        ]
    from ie.data.layouts import read_source

    for source in sources:
        _check_task(source.task, templates)
    found: list[_Found] = []
    for source in sorted(sources, key=lambda source: PRECEDENCE.index(source.split) if source.split else len(SPLITS)):
        result = read_source(source.path, source.task)
        skipped[source.task].update(result.skipped)
        found += [_Found(record, source.split) for record in result.records]
    return found, [
        {"task": source.task, "split": source.split, "file": str(source.path), "sha256": _sha256(source.path)}
        for source in sources
    ]


def _check_task(task: str, templates: Mapping[str, Template]) -> None:
    if task not in templates:
        raise InputError(
            f"unknown task {task!r}: there is no template for it",
            hint=f"{did_you_mean(task, templates)}there are {', '.join(sorted(templates))}; "
            f"for a task of your own write {task}.yaml and pass its folder with --templates",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _placed(found: Iterable[_Found], seed: int, skipped: Skipped) -> dict[Split, list[Record]]:
    """Puts every record into its split; counts those whose subject belongs elsewhere, and those said twice."""
    found = list(found)
    home: dict[str, Split] = {}
    for split in PRECEDENCE:
        for item in found:
            if item.pinned == split:
                home.setdefault(normal_subject(item.record.subject), split)
    placed: dict[Split, list[Record]] = {split: [] for split in SPLITS}
    seen: set[tuple[str, str, str]] = set()
    ids: set[str] = set()
    for item in found:
        record = item.record
        split = item.pinned or split_of(record.subject, seed)
        owner = home.get(normal_subject(record.subject), split)
        key = (record.task, record.prompt, record.target)
        if owner != split:
            skipped[record.task][f"subject in {owner} file"] += 1
        elif key in seen:
            skipped[record.task]["duplicate"] += 1
        else:
            seen.add(key)
            placed[split].append(_with_new_id(record, ids))
    return placed


def _with_new_id(record: Record, ids: set[str]) -> Record:
    """The record under an id that no other has: two files may number their records alike."""
    name, n = record.id, 2
    while name in ids:
        name, n = f"{record.id}~{n}", n + 1
    ids.add(name)
    return record if name == record.id else record.model_copy(update={"id": name})


def _limited(
    placed: dict[Split, list[Record]], limit: int | None, seed: int, skipped: Skipped
) -> dict[Split, list[Record]]:
    """At most `limit` records a task, drawn by seed, in proportion to its splits."""
    if limit is None:
        return placed
    kept: dict[Split, list[Record]] = {split: [] for split in SPLITS}
    for task in sorted({record.task for records in placed.values() for record in records}):
        mine = {split: [record for record in placed[split] if record.task == task] for split in SPLITS}
        quota = quotas({split: len(records) for split, records in mine.items()}, limit)
        for split, records in mine.items():
            drawn = sorted(records, key=lambda record: rank(seed, "limit", record.id))[: quota[split]]
            chosen = {record.id for record in drawn}
            kept[split] += [record for record in records if record.id in chosen]
            if len(records) > len(chosen):
                skipped[task]["over the limit"] += len(records) - len(chosen)
    return kept


def _check_left(
    described: Sequence[Mapping[str, Any]], placed: Mapping[Split, Sequence[Record]], skipped: Skipped
) -> None:
    """No task may silently come to nothing."""
    left = {record.task for records in placed.values() for record in records}
    for task in sorted({source["task"] for source in described} - left):
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(skipped[task].items())) or "the files hold none"
        raise DataError(f"no record is left for the task {task!r} ({reasons})", hint="check the task's files")


def _instructed(record: Record, templates: Mapping[str, Template], split: Split) -> Record:
    """The record with the instructions of its split and the scope of its task."""
    template = templates[record.task]
    if template.scope == "wording":
        record = _of_one_wording(record)
    if split == "train":
        instruction = Instructions(train=template.render(record, "train"))
    else:
        instruction = Instructions(heldout=template.render(record, "heldout"))
    return record.model_copy(update={"instruction": instruction})


def _of_one_wording(record: Record) -> Record:
    """The record with its other wordings among the questions that must keep their answers."""
    kept = tuple(Question(prompt=text, answer=record.ground_truth) for text in record.rephrases if record.ground_truth)
    return record.model_copy(update={"rephrases": (), "portability": (), "locality": (*kept, *record.locality)})


def _describe(
    records: Mapping[Split, Sequence[Record]],
    skipped: Skipped,
    templates: Mapping[str, Template],
    described: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What dataset.json says, but for seed, limit and fingerprint."""
    tasks = sorted({record.task for split in SPLITS for record in records[split]})
    counts = {split: Counter(record.task for record in records[split]) for split in SPLITS}
    notes: dict[str, Counter[str]] = {task: Counter() for task in tasks}
    for split in SPLITS:
        for record in records[split]:
            for field in ("rephrases", "locality", "portability"):
                notes[record.task][f"without {field}"] += not getattr(record, field)
    return {
        "format_version": FORMAT_VERSION,
        "tasks": {
            task: {
                **{split: counts[split][task] for split in SPLITS},
                "skipped": dict(sorted(skipped[task].items())),
                "notes": {note: n for note, n in notes[task].items() if n},
            }
            for task in tasks
        },
        "instructions": {
            task: {"train": len(templates[task].train), "heldout": len(templates[task].heldout)} for task in tasks
        },
        "styles": {task: list(templates[task].styles) for task in tasks},
        "templates": fingerprint({task: templates[task] for task in tasks}),
        "sources": list(described),
    }


def _write_records(folder: Path, records: Mapping[Split, Sequence[Record]]) -> str:
    """Writes the split files; their fingerprint, the same that `Dataset.load` finds."""
    digest = hashlib.sha256()
    for split in SPLITS:
        path = folder / split_file(split)
        with path.open("w", encoding="utf-8", newline="\n") as file, jsonlines.Writer(file) as writer:
            writer.write_all(_line(record) for record in records[split])
        digest.update(bytes.fromhex(_sha256(path)))
    return digest.hexdigest()[:16]


def _line(record: Record) -> dict[str, Any]:
    content = record.model_dump(mode="json")
    content["instruction"] = {group: texts for group, texts in content["instruction"].items() if texts}
    return content
