"""What each command's result looks like to a person: the JSON's dictionary in, Rich renderables out.

All tables fit 80 columns: texts fold, figures don't.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .render import visible

if TYPE_CHECKING:
    from .report import Line, Section

__all__ = [
    "apply_view",
    "build_view",
    "demo_view",
    "doctor_view",
    "edit_view",
    "eval_view",
    "inspect_view",
    "plan_view",
    "size",
    "train_view",
]

Json = Mapping[str, Any]
View = list[RenderableType]

_GAP = Text("")


def _table(title: str | None, *heads: str, figures: Sequence[str] = (), narrow: bool = False) -> Table:
    """Return an empty table; the columns named in `figures` are aligned right and never cut.

    A narrow table spends fewer columns on the space between its own.
    """
    table = Table(
        title=title and visible(title), title_justify="left", title_style="bold", show_edge=False, pad_edge=False,
        box=None if narrow else box.SIMPLE_HEAD, padding=(0, 2, 0, 0) if narrow else (0, 1),
    )  # fmt: skip
    for head in heads:
        is_figure = head in figures
        justify: Literal["left", "right"] = "right" if is_figure else "left"
        table.add_column(head, justify=justify, no_wrap=is_figure, overflow="fold")
    return table


def _row(table: Table, *cells: object) -> None:
    table.add_row(*(one if isinstance(one, Text) else Text("-" if one is None else visible(str(one))) for one in cells))


def _facts(title: str | None, facts: Json) -> Table:
    """Return a table of names and values; what is None is left out."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            table.add_row(Text(visible(name)), Text(visible(_value(value))))
    return table


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        between = "\n" if any(isinstance(item, Mapping) for item in value) else ", "
        return between.join(map(_value, value)) or "none"
    return str(value)


def size(n_bytes: float | None) -> str | None:
    """Write a number of bytes for people: 12.3 KB."""
    if n_bytes is None:
        return None
    for unit in ("bytes", "KB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"


def build_view(result: Json) -> View:
    """Records of each task and split, and what was skipped."""
    reasons = [
        Text(f"{task}: skipped {n}: {reason}")
        for task, entry in result["tasks"].items()
        for reason, n in (entry.get("skipped") or {}).items()
    ]
    facts = {"dataset": result["out"], "fingerprint": result["fingerprint"]}
    return [_counts(result), _GAP, *reasons, *([_GAP] if reasons else []), _facts(None, facts)]


def _counts(result: Json) -> Table:
    """Return the table of a dataset's tasks."""
    counts = ("train", "validation", "test", "skipped", "instructions")
    table = _table(None, "task", *counts, figures=counts)
    for task, entry in result["tasks"].items():
        texts = result.get("instructions", {}).get(task, {})
        n_texts = f"{texts.get('train', 0)} + {texts.get('heldout', 0)}"
        n_skipped = sum((entry.get("skipped") or {}).values())
        _row(table, task, *(entry.get(split, 0) for split in ("train", "validation", "test")), n_skipped, n_texts)
    return table


def train_view(result: Json) -> View:
    """The editor, what it took, and how well it validates."""
    facts = {
        "editor": result["editor"],
        "base": result["base"],
        "tasks": result["tasks"],
        "hold-out": result["holdout"] or "none",
        "steps": result["steps"],
        "episodes": f"{result['episodes']} ({result['episodes_per_second']:.1f} per second)",
        "time": f"{result['seconds']:.0f} s",
        "peak memory": size(result["peak_memory_bytes"]),
        "prefix kept": _kept(result["prefix_kept"]),
        **{f"validation {name}": _percent(value) for name, value in result["validation"].items()},
    }
    return [_facts(None, facts)]


def _kept(kept: Mapping[str, int]) -> str:
    in_file = f", {size(kept['file_bytes'])} in a file" if kept["file_bytes"] else ""
    return f"{kept['texts']} texts, {size(kept['memory_bytes'])} in memory{in_file}"


def _percent(share: object) -> str | None:
    return f"{share:.1%}" if isinstance(share, int | float) else None


def edit_view(result: Json) -> View:
    """Before and after of one edit and its probes, or one line for each of many edits."""
    if "edits" in result:
        table = _table(None, "prompt", "target", "before", "after", "took")
        for entry in result["edits"]:
            _row(table, *(entry[key] for key in ("prompt", "target", "before", "after")), _mark(entry["took"]))
        n_took = sum(bool(entry["took"]) for entry in result["edits"])
        lines = [f"{n_took} of {len(result['edits'])} edits took"]
        if result.get("still_take") is not None:
            lines.append(f"{_percent(result['still_take'])} of those that took at once still take after the others")
        n_unknown = sum(entry.get("kind") == "unknown" for entry in result["edits"])
        if n_unknown:
            lines.append(f"{n_unknown} are of a kind unknown to the editor (see --task)")
        if "patch" in result:
            lines.append(f"{result['patch']} ({size(result['bytes'])}, rank {result['rank']}, {result['dtype']})")
        else:
            total = size(sum(entry["bytes"] for entry in result["edits"]))
            lines.append(f"patches in {Path(result['edits'][0]['patch']).parent} ({total})")
        return [table, _GAP, *_changed_probes(result["edits"]), *map(Text, lines)]
    table = _table(None, "", "prompt", "before", "after")
    _row(table, "edit", result["prompt"], result["before"], Text(visible(str(result["after"])), style="bold"))
    for probe in result.get("probes", ()):
        state = Text("changed", style="yellow") if probe["changed"] else Text("same")
        _row(table, state, probe["prompt"], probe["before"], probe["after"])
    chance = result["target_probability"]
    facts = {
        "target": result["target"],
        "took": bool(result["took"]),
        "target probability": f"{_probability(chance['before'])} before, {_probability(chance['after'])} after",
        "patch": f"{result['patch']} ({size(result['bytes'])}, rank {result['rank']}, {result['dtype']})",
        "energy kept": _percent(result["energy_kept"]),
        **({"kind of edit": _kind(result["kind"])} if "kind" in result else {}),
        "time": f"{result['seconds']:.2f} s",
    }
    return [table, _GAP, _facts(None, facts)]


def _changed_probes(edits: Sequence[Json]) -> View:
    """Of many edits' probes those that an edit moved, and how many there are."""
    table = _table(None, "edit", "changed probe", "before", "after")
    for entry in edits:
        for probe in entry["probes"]:
            if probe["changed"]:
                _row(table, entry["prompt"], probe["prompt"], probe["before"], probe["after"])
    n_probes = sum(len(entry["probes"]) for entry in edits)
    moved: View = [table, _GAP] if table.row_count else []
    return [*moved, *([Text(f"{table.row_count} of {n_probes} probes changed")] if n_probes else [])]


def _probability(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else f"{value:.1e}"


def _kind(name: str) -> str:
    return "unknown to the editor (see --task)" if name == "unknown" else name


def _mark(took: object) -> Text:
    return Text("-") if took is None else Text("yes") if took else Text("no", style="red")


def apply_view(result: Json) -> View:
    """The previews, what each edit does beside the others, and what was written."""
    parts: View = []
    if result["previews"]:
        table = _table(None, "prompt", "before", "after")
        for preview in result["previews"]:
            _row(table, preview["prompt"], preview["before"], Text(visible(str(preview["after"])), style="bold"))
        parts += [table, _GAP]
    if len(result["patches"]) > 1:
        table = _table(None, "", "patch", "alone", "together", "disturbed by")
        by = {entry["number"]: ", ".join(map(str, entry["by_numbers"])) or "all" for entry in result["disturbed"]}
        for number, entry in enumerate(result["patches"], 1):
            marks = (_mark(entry["took_alone"]), _mark(entry["took"]))
            _row(table, number, entry["name"], *marks, by.get(number, ""))
        parts += [table, _GAP]
    facts = {
        "patches": list(dict.fromkeys(entry["patch"] for entry in result["patches"])),
        "took": _took(result),
        "stacked": _file(result["out"]),
        "merged": _checkpoint(result["merged"]),
        "peft adapter": result["peft"],
        **{one["server"]: one["flags"] if one["takes"] else f"no: {one['reason']}" for one in result["checks"]},
    }
    return [*parts, _facts(None, facts)]


def _took(result: Json) -> object:
    """Whether the edits take; of joint ones how many do."""
    edits = [one for entry in result["patches"] for one in entry.get("edits", ())]
    return f"{sum(one['took'] for one in edits)} of {len(edits)} joint edits" if edits else result["took"]


def _file(written: Json | None) -> str | None:
    return None if written is None else f"{written['path']} ({size(written['bytes'])}, {written['edits']} edits)"


def _checkpoint(merged: Json | None) -> str | None:
    if merged is None:
        return None
    took = {True: "took; ", False: "did not take; ", None: ""}[merged["took"]]
    return f"{merged['path']}: {took}{merged['kept']:.1%} of the change is left in {merged['dtype']}"


def eval_view(result: Json) -> View:
    """The summary, a table for each task with methods side by side, those of the controls, and the settings."""
    from .report import LEGEND, sections, settings, summary_of  # here: `ie inspect` has no use for it

    parts: View = [*(Text(f"- {visible(line)}") for line in summary_of(result)), _GAP]
    for section in sections(result):
        parts += [_beside(section) if len(section.names) <= 2 else _below(section), _GAP]
    return [*parts, Text(LEGEND), _GAP, _facts(None, settings(result))]


def _beside(section: Section) -> Table:
    """Two methods at most: a column for each."""
    names = section.names
    table = _table(
        section.title, "metric", "query", "decoding", "n", *names.values(), figures=("n", *names.values()), narrow=True
    )
    for line in section.lines:
        cells = (_cell(line, name, stacked=False) for name in names)
        _row(table, line.metric, line.query, line.decoding, line.n, *cells)
    return table


def _below(section: Section) -> Table:
    """Many methods: a line for each, and a column for each way of asking."""
    lines = section.lines
    ways = list(dict.fromkeys((line.query, line.decoding) for line in lines))
    heads = ["\n".join(way) for way in ways]
    found = {(line.metric, line.query, line.decoding): line for line in lines}
    table = _table(section.title, "metric", section.column, "n", *heads, figures=("n", *heads), narrow=True)
    for metric in dict.fromkeys(line.metric for line in lines):
        for name, label in section.names.items():
            there = [found.get((metric, *way)) for way in ways]
            n = max(line.n for line in there if line)
            _row(table, metric, label, n, *(_cell(line, name, stacked=True) if line else None for line in there))
    return table


def _cell(line: Line, name: str, *, stacked: bool) -> Text:
    """A figure; the best one bold as well as marked, so that it shows without colour too."""
    from .report import cell

    best = name == line.best
    return Text(cell(line.cells.get(name), stacked=stacked, best=best), style="bold green" if best else "")


def inspect_view(result: Json) -> View:
    """Everything that the file says about itself; the lists that are long as tables."""
    if result["kind"] == "patch":
        return _patch_view(result)
    in_tables = {"tasks", "instructions", "styles"} if result["kind"] == "dataset" else set()
    facts = {key: value for key, value in result.items() if key not in in_tables}
    facts["bytes"] = f"{facts['bytes']} ({size(facts['bytes'])})"
    parts: View = [_facts(None, facts)]
    if result["kind"] == "dataset":
        parts += [_GAP, _counts(result)]
    return parts


def _patch_view(result: Json) -> View:
    """A patch for its reviewer: what it changes first, then how far it reaches, then where it comes from."""
    parts: View = []
    parents = [entry for entry in _listed(result, "parents") if isinstance(entry.get("info"), Mapping)]
    probes = _listed(result, "probes")
    if parents:
        table = _table(None, "edit", "prompt", "wanted", "alone", "together")
        for number, entry in enumerate(parents, 1):
            info = entry["info"]
            alone = info.get("took") if entry.get("ranks") else None  # in a joint patch no edit stands alone
            marks = (_mark(alone), _mark(entry.get("took")))
            _row(table, f"{number} {entry.get('name')}", info.get("prompt"), info.get("target"), *marks)
        parts += [table, _GAP]
    elif result.get("prompt") is not None:
        table = _table(None, "", "prompt", "before", "after", "wanted")
        _row(table, "edit", *(result.get(key) for key in ("prompt", "before", "after", "target")))
        for probe in probes:
            state = "same" if probe.get("before") == probe.get("after") else "changed"
            _row(table, state, *(probe.get(key) for key in ("prompt", "before", "after")), "")
        parts += [table, _GAP]
    table = _table(None, "module", "rank", "norm", "A", "B", "dtype", figures=("rank", "norm"))
    for name, entry in result["modules"].items():
        norm = entry["norm"]
        shown = f"{norm:.4g}" if isinstance(norm, int | float) else None
        _row(table, name, entry["rank"], shown, _shape(entry["A"]), _shape(entry["B"]), entry["dtype"])
    done = {"modules", "parents", "probes", "prompt", "before", "after", "target"}
    facts = {key.replace("_", " "): value for key, value in result.items() if key not in done}
    facts["bytes"] = f"{facts['bytes']} ({size(facts['bytes'])})"
    return [*parts, table, _GAP, _facts(None, facts)]


def _listed(result: Json, key: str) -> list[Json]:
    """A list of objects, whatever the file holds there."""
    found = result.get(key)
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def demo_view(result: Json) -> View:
    """The demo's parts, each as its own command shows it."""
    parts: View = []
    views = (
        ("build", build_view), ("train", train_view), ("edit", edit_view), ("apply-patch", apply_view),
        ("eval", eval_view),
    )  # fmt: skip
    for name, view in views:
        part = result.get(name)
        if part is not None:
            parts += [Text(f"\nie {name}", style="bold"), *view(part)]
    return parts


def doctor_view(result: Json) -> View:
    """The machine, the versions, and the choices made for it."""
    machine = {
        "python": f"{result['python']} on {result['platform']}",
        "cores": result["cores"],
        "memory": size(result["memory_bytes"]),
        "gpu": f"{result['gpu']} ({size(result['gpu_memory_bytes'])})" if result["gpu"] else "none",
        "fast bfloat16": "not known here" if result["bf16"] is None else result["bf16"],
    }
    plan = {key: result[key] for key in ("base", "device", "dtype", "quant", "reason")}
    versions = {name: version or "not installed" for name, version in result["versions"].items()}
    parts: View = [_facts("Machine", machine), _GAP, _facts("Versions", versions), _GAP, _facts("Will be used", plan)]
    estimate = result.get("memory_estimate")
    return [*parts, _GAP, _memory(estimate)] if estimate else parts


def _memory(estimate: Mapping[str, int]) -> Table:
    sizes = {name.replace("_", " "): size(n_bytes) for name, n_bytes in estimate.items()}
    return _facts("Memory needed (estimate)", sizes)


def plan_view(result: Json) -> View:
    """The settings of a training, what it edits, and what it needs."""
    plan = {key: result[key] for key in ("device", "dtype", "quant", "reason")}
    plan["edit targets"] = result["targets"]
    seconds = result["seconds_estimate"]
    plan["time (rough estimate)"] = "not known here" if seconds is None else f"{seconds / 60:.0f} minutes"
    return [_facts("Configuration", result["config"]), _GAP, _facts("Will be used", plan), _GAP,
            _memory(result["memory_estimate"])]  # fmt: skip
