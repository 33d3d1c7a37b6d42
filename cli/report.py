"""The evaluation report as lines of text cells, for the terminal's tables and for Markdown alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LEGEND", "Line", "Section", "cell", "sections", "settings", "summary_of", "to_markdown"]

BEFORE = "none"
METHODS = (BEFORE, "instructedit", "instructedit-joint", "mend", "finetune", "gradient", "ultra")
CONTROLS = ("right", "none", "wrong-task", "random", "unseen")
METRICS = (
    "reliability", "generalization", "portability", "locality", "locality-known", "harmonic-mean", "fluency",
)  # fmt: skip
QUERIES = ("plain", "instructed")
DECODINGS = ("generated", "forced")

Row = Mapping[str, Any]


@dataclass
class Line:
    """One line of a table: what was measured how, and a figure for each column."""

    metric: str
    query: str
    decoding: str
    n: int
    cells: dict[str, Row] = field(default_factory=dict)
    best: str | None = None


@dataclass(frozen=True)
class Section:
    """One table: a task's figures, a column for each method, control or style."""

    title: str
    column: str
    names: Mapping[str, str]
    lines: Sequence[Line]


def sections(result: Mapping[str, Any]) -> list[Section]:
    """The report's tables: methods side by side, then what editors do when told other things than what is right."""
    rows, gaps = named(result["rows"]), named(result.get("differences", ()))
    groups: list[tuple[list[Row], str, str]] = [([row for row in rows if not row.get("control")], "method", "")]
    controlled = list(dict.fromkeys(row["method"] for row in rows if row.get("control")))
    for method in controlled:
        mine = [row for row in rows if row.get("control") and row["method"] == method]
        styled: list[Row] = [{**row, "control": row["style"]} for row in mine if row.get("style")]
        told = [row for row in mine if not row.get("style")]
        less = [
            _less(row) for row in gaps if row.get("control") and not row.get("versus_style") and row["method"] == method
        ]
        of = f" of {method}" if len(controlled) > 1 else ""
        groups += [
            (told, "control", f"{of}: which instruction"),
            (less, "control", f"{of}: right instruction less another, in points"),
            (styled, "control", f"{of}: each unseen wording"),
        ]
    out = []
    for found, column, suffix in groups:
        names = labels(found, column)
        for task, lines in by_task(found, column).items():
            held = " (held out)" if task == result.get("holdout") else ""
            if column == "method":
                _mark_best(task, lines, [row for row in gaps if not row.get("control")])
            out.append(Section(f"{task}{held}{suffix}", column, names, lines))
    return out


_FEW = 10  # records whose bootstrap says nothing


def _less(gap: Row) -> Row:
    return {**gap, "control": gap["versus_control"], "signed": True}


def _mark_best(task: str, lines: Sequence[Line], gaps: Sequence[Row]) -> None:
    """Name a line's best method where the intervals of its differences from all other editing methods exclude zero."""
    ahead: dict[tuple[str, str, str], dict[str, set[str]]] = {}
    for row in gaps:
        if row["task"] == task and row["n"] >= _FEW and row["low"] is not None:
            pair = (row["method"], row["versus"])
            better, worse = pair if row["low"] > 0 else pair[::-1]
            if row["low"] > 0 or row["high"] < 0:
                key = (row["metric"], row["query"], row["decoding"])
                ahead.setdefault(key, {}).setdefault(better, set()).add(worse)
    for line in lines:
        others = len(line.cells) - 1 - (BEFORE in line.cells)
        beaten = ahead.get((line.metric, line.query, line.decoding), {})
        line.best = next((name for name, losers in beaten.items() if others and len(losers) == others), None)


def settings(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the figures depend on."""
    keys = ("base", "dtype", "quant", "editor", "data_fingerprint", "seed", "versions")
    return {key.replace("_", " "): result[key] for key in keys if key in result}


def named(rows: Sequence[Row]) -> list[Row]:
    """The rows, with the editor's folder in the method's name where one method stands for several editors."""
    sides = (("method", "editor"), ("versus", "versus_editor"))
    editors = {(row[method], row.get(editor)) for row in rows for method, editor in sides if method in row}
    shared = {method for method, _ in editors if len([one for one in editors if one[0] == method]) > 1}
    return [
        {**row, **{key: f"{row[key]} {row[editor]}" for key, editor in sides if row.get(key) in shared}} for row in rows
    ]


def by_task(rows: Iterable[Row], column: str) -> dict[str, list[Line]]:
    """Group rows by task, and put what differs only in `column` (method or control) on one line."""
    tasks: dict[str, dict[tuple[str, str, str], Line]] = {}
    for row in rows:
        key = (row["metric"], row["query"], row["decoding"])
        lines = tasks.setdefault(row["task"], {})
        line = lines.setdefault(key, Line(*key, n=0))
        line.n = max(line.n, row["n"])
        line.cells[row[column]] = row
    return {task: [lines[key] for key in sorted(lines, key=_order)] for task, lines in tasks.items()}


def _order(key: tuple[str, str, str]) -> tuple[tuple[int, str], ...]:
    known = (METRICS, QUERIES, DECODINGS)
    return tuple((_place(value, values), value) for value, values in zip(key, known, strict=True))


def _place(value: str, known: Sequence[str]) -> int:
    return known.index(value) if value in known else len(known)


def labels(rows: Iterable[Row], column: str) -> dict[str, str]:
    """Return the columns in their order, each with its heading: before and after when one method is measured."""
    known = METHODS if column == "method" else CONTROLS
    found = sorted({row[column] for row in rows}, key=lambda name: (_place(name, known), name))
    names = {name: name for name in found}
    if column == "method":
        edited = [name for name in found if name != BEFORE]
        if BEFORE in names:
            names[BEFORE] = "before"
        if len(edited) == 1:
            names[edited[0]] = "after"
    return names


def cell(row: Row | None, *, stacked: bool = False, best: bool = False) -> str:
    """Write a figure with its 95 % interval: in percent, but fluency, which is no share."""
    if row is None or row["value"] is None or row["value"] != row["value"]:
        return "-"
    factor = 1 if row["metric"] == "fluency" else 100
    value = f"{'* ' if best else ''}{row['value'] * factor:{'+' if row.get('signed') else ''}.1f}"
    if any(end is None or end != end for end in (row.get("low"), row.get("high"))):
        return value
    between = "\n" if stacked else " "
    to = "-" if not row.get("signed") else ".." if stacked else " to "
    return f"{value}{between}({row['low'] * factor:.0f}{to}{row['high'] * factor:.0f})"


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the report as Markdown: the summary, a table for each task, controls after them, the settings."""
    summary = "\n".join(f"- {line}" for line in summary_of(result))
    parts = ["# Evaluation", f"Hold-out: {result.get('holdout') or 'none'}.", summary, LEGEND]
    for section in sections(result):
        heads = ["metric", "query", "decoding", "n", *section.names.values()]
        body = [
            [
                line.metric, line.query, line.decoding, str(line.n),
                *(cell(line.cells.get(name), best=name == line.best) for name in section.names),
            ]
            for line in section.lines
        ]  # fmt: skip
        rule = ["---"] * 3 + ["---:"] * (len(heads) - 3)
        parts.append(f"## {section.title}")
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *body)))
    parts.append("\n".join(f"- {name}: `{value}`" for name, value in settings(result).items()))
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "Percent, with 95 % intervals; fluency is an entropy. plain: the query carries no instruction; generated: greedy "
    "decoding, exact match; forced: teacher-forced tokens; locality-known: questions that the base answered rightly; "
    "harmonic-mean: of reliability, generalization and locality; *: better than every other method, beyond chance."
)

_GOOD, _GAP = 0.9, 0.1


def summary_of(result: Mapping[str, Any]) -> list[str]:
    """At most six sentences: what works, what does not, what to try. Judged by plain queries, generated if measured."""
    rows = [row for row in result["rows"] if row["query"] == "plain" and not row.get("control")]
    edited = [row for row in named(rows) if row["method"] != BEFORE]
    if not edited:
        return ["No editing method was measured: these are the base's own answers."]
    method = edited[0]["method"]
    decoding = "generated" if any(row["decoding"] == "generated" for row in edited) else "forced"
    of_method = {
        (row["task"], row["metric"], row["decoding"]): row["value"] for row in edited if row["method"] == method
    }
    # Of opinions' generalization nothing is generated: what is forced counts there.
    ways = ("forced", decoding)
    found = {(task, metric): value for last in ways for (task, metric, way), value in of_method.items() if way == last}
    advice = {
        "reliability": "edits do not take often enough; train longer, or give more records of the task",
        "generalization": "edits do not reach other wordings; give records with more rephrases",
        "locality": "edits spread to unrelated questions; raise locality_weight or n_negatives in --config",
    }
    good = sorted(
        task for task in {task for task, _ in found} if all(found.get((task, one), 1.0) >= _GOOD for one in advice)
    )
    works = ", ".join(good) or "no task"
    out = [f"{method}, plain and {decoding}: {works} at 90 % or more in all of {', '.join(advice)}."]

    def weak(metric: str, what: str) -> list[str]:
        tasks = sorted(task for (task, name), value in found.items() if name == metric and value < _GOOD)
        return [f"{metric} is below 90 % for {', '.join(tasks)}: {what}."] if tasks else []

    for metric, what in advice.items():
        out += weak(metric, what)
    flattered = sorted(
        task
        for (task, metric, way), value in of_method.items()
        if metric == "reliability" and way == "forced" and value - found.get((task, metric), value) > _GAP
    )
    if flattered:
        out.append(
            f"Teacher forcing flatters {', '.join(flattered)} by more than 10 points: trust the generated figures."
        )
    out += _instruction_matters(result, method)
    out += weak("portability", "what follows from a new fact needs edits of its own")
    return out[:6]


def _instruction_matters(result: Mapping[str, Any], method: str) -> list[str]:
    gaps = [
        row
        for row in named(result.get("differences", ()))
        if row["method"] == method and row.get("control") == "right"
        if (row["metric"], row["query"]) == ("harmonic-mean", "plain")
        if row["versus_control"] in ("none", "wrong-task", "random")
    ]
    if not gaps:
        return []
    tasks = sorted({row["task"] for row in gaps if row["low"] > 0})
    if tasks:
        return [f"The right instruction edits better than another, or none, in: {', '.join(tasks)}."]
    return ["The instruction makes no difference beyond chance: right, wrong, random and none edit alike."]
