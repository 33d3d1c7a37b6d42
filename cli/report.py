"""The evaluation report as lines of text cells, for the terminal's tables and for Markdown alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BEFORE", "CONTROLS", "Line", "by_task", "cell", "labels", "named", "to_markdown"]

BEFORE = "none"
METHODS = (BEFORE, "instructedit", "mend", "finetune", "gradient")
CONTROLS = ("right", "none", "wrong-task", "random", "unseen")
METRICS = ("reliability", "generalization", "portability", "locality", "fluency")
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


def named(rows: Sequence[Row]) -> list[Row]:
    """The rows, with the editor's folder in the method's name where one method stands for several editors."""
    editors = {(row["method"], row.get("editor")) for row in rows}
    shared = {method for method, _ in editors if len([one for one in editors if one[0] == method]) > 1}
    return [{**row, "method": f"{row['method']} {row['editor']}"} if row["method"] in shared else row for row in rows]


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


def cell(row: Row | None, *, stacked: bool = False) -> str:
    """Write a figure with its 95 % interval: in percent, but fluency, which is no share."""
    if row is None or row["value"] is None or row["value"] != row["value"]:
        return "-"
    factor = 1 if row["metric"] == "fluency" else 100
    value = f"{row['value'] * factor:.1f}"
    if row.get("low") is None or row.get("high") is None:
        return value
    between = "\n" if stacked else " "
    return f"{value}{between}({row['low'] * factor:.0f}-{row['high'] * factor:.0f})"


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the report as Markdown: a table for each task, controls after them."""
    plain_rows = named([row for row in result["rows"] if not row.get("control")])
    control_rows = [row for row in result["rows"] if row.get("control")]
    parts = ["# Evaluation", f"Base: `{result['base']}`. Hold-out: {result.get('holdout') or 'none'}.", LEGEND]
    parts += _sections(plain_rows, "method", result.get("holdout"), "")
    parts += _sections(control_rows, "control", result.get("holdout"), ": which instruction")
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "Percent, with 95 % intervals; fluency is an entropy. "
    "plain: the query carries no instruction; generated: greedy decoding, exact match; forced: teacher-forced tokens."
)


def _sections(rows: Sequence[Row], column: str, holdout: str | None, suffix: str) -> list[str]:
    names = labels(rows, column)
    parts: list[str] = []
    for task, lines in by_task(rows, column).items():
        heads = ["metric", "query", "decoding", "n", *names.values()]
        body = [
            [line.metric, line.query, line.decoding, str(line.n), *(cell(line.cells.get(name)) for name in names)]
            for line in lines
        ]
        rule = ["---"] * 3 + ["---:"] * (len(heads) - 3)
        parts.append(f"## {task}{' (held out)' if task == holdout else ''}{suffix}")
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *body)))
    return parts
