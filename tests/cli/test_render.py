from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
from ie.cli import tables
from ie.cli.render import Render
from ie.cli.report import cell, sections, summary_of, to_markdown
from rich.console import Console, RenderableType

LONG = "a prompt that is much longer than one column of a table can be, with [brackets] and :smile: in it"
EDIT = {
    "patch": "patch.safetensors", "bytes": 12_345, "rank": 9, "dtype": "float16", "energy_kept": 0.9991,
    "took": True, "prompt": LONG, "target": "Sydney",
    "before": "Canberra", "after": "Sydney", "target_probability": {"before": 2e-7, "after": 0.98765},
    "probes": [{"prompt": LONG, "before": "Paris", "after": "Rome", "changed": True}], "seconds": 0.512,
}  # fmt: skip


def row(method: str, value: float | None = 0.9512, metric: str = "reliability", **more: Any) -> dict[str, Any]:
    low, high = (value * 0.9, min(1.0, value * 1.05)) if value is not None else (None, None)
    found = {
        "task": "zsre", "method": method, "query": "plain", "decoding": "generated", "metric": metric,
        "value": value, "low": low, "high": high, "n": 128,
    }  # fmt: skip
    return {**found, **more}


METRICS = ("reliability", "generalization", "portability", "locality")
EVAL = {
    "holdout": "zsre",
    "base": "toy",
    "editor": "ie-editor",
    "rows": [
        row(method, value, metric, query=query, decoding=decoding, task=task)
        for task in ("places", "zsre")
        for method, value in (("instructedit", 1.0), ("none", 0.0))
        for metric in METRICS
        for query in ("instructed", "plain")
        for decoding in ("forced", "generated")
    ],
}
MANY = {**EVAL, "rows": [row(m) for m in ("gradient", "finetune", "mend", "instructedit", "none")]}
CONTROLS = {
    **EVAL,
    "rows": [row("instructedit", control=c) for c in ("unseen", "random", "wrong-task", "none", "right")],
}
BUILD = {
    "out": "ie-data",
    "tasks": {"places": {"train": 900, "validation": 50, "test": 100, "skipped": {"no answer": 3}}},
    "instructions": {"places": {"train": 10, "heldout": 5}},
    "fingerprint": "0123456789abcdef0123",
}
TRAIN = {
    "editor": "ie-editor", "base": "toy", "tasks": ["people", "places"], "holdout": None, "steps": 10, "episodes": 160,
    "seconds": 12.5, "episodes_per_second": 12.8, "peak_memory_bytes": 512_000_000,
    "prefix_kept": {"texts": 1200, "memory_bytes": 31_000_000, "file_bytes": 4_000_000},
    "validation": {"reliability": 0.987, "generalization": 0.9, "locality": None},
}  # fmt: skip
APPLIED = {
    "patch": "a.safetensors", "name": "a.safetensors", "prompt": LONG, "target": "Sydney", "before": "Canberra",
    "after": "Sydney", "took": True, "took_alone": True,
}  # fmt: skip
APPLY = {
    "patches": [APPLIED, {**APPLIED, "patch": "b.safetensors", "name": "b.safetensors", "took": False}],
    "took": False,
    "disturbed": [
        {"number": 2, "patch": "b.safetensors", "prompt": LONG, "by": ["a"], "by_numbers": [1], "most_by": "a"}
    ],
    "previews": [{"prompt": LONG, "before": "Canberra", "after": "Sydney"}],
    "out": {"path": "c.safetensors", "bytes": 45_600, "edits": 2},
    "merged": {"path": "m", "dtype": "bfloat16", "kept": 0.553, "took": True, "answers": ["Sydney"], "n_tensors": 9},
    "peft": {"path": "adapter", "rank": 16},
    "checks": [
        {"server": "vllm", "takes": True, "reason": None, "flags": "vllm serve BASE --enable-lora"},
        {"server": "sglang", "takes": False, "reason": "gpt2: no LoRA", "flags": None},
    ],
}
PATCH = {
    "kind": "patch", "path": "p.safetensors", "bytes": 45_600, "format_version": 1, "rank": 3,
    "base": {"id": "toy", "fingerprint": "ab12", "revision": None}, "prompt": LONG, "target": "Sydney",
    "before": "Canberra", "after": "Sydney", "took": True, "kept": {"energy": 0.9991, "rank_before": 12},
    "probes": [{"prompt": "Q", "before": "Paris", "after": "Rome"}, {"prompt": "R", "before": "Oslo", "after": "Oslo"}],
    "parents": [],
    "modules": {
        "model.layers.10.mlp.up_proj": {"rank": 3, "norm": 0.12345, "A": [3, 16], "B": [3, 32], "dtype": "F16"}
    },
}  # fmt: skip
STACK = {
    **PATCH,
    "prompt": None,
    "parents": [{"name": "a.safetensors", "took": False, "info": {"prompt": LONG, "target": "Sydney", "took": True}}],
}
DOCTOR = {
    "python": "3.11.7", "platform": "Linux x86_64", "cores": 2, "memory_bytes": 25e9, "gpu": None,
    "gpu_memory_bytes": None, "bf16": False, "versions": {"torch": "2.13.0", "peft": None}, "base": "toy",
    "device": "cpu", "dtype": "float32", "quant": "none", "reason": "no GPU: fp32 is exact",
}  # fmt: skip

CASES: list[tuple[Callable[[Any], list[RenderableType]], dict[str, Any], list[str]]] = [
    (
        tables.edit_view,
        EDIT,
        ["Sydney", "[brackets]", ":smile:", "changed", "2.0e-07", "0.9877", "12.3 KB", "rank 9", "99.9%"],
    ),
    (
        tables.edit_view,
        {"edits": [EDIT, {**EDIT, "took": False, "probes": [{**EDIT["probes"][0], "changed": False}]}]},
        ["1 of 2 edits took", "patches in . (24.7 KB)", "changed probe", "Rome", "1 of 2 probes changed"],
    ),
    (tables.eval_view, EVAL, ["zsre (held out)", "before", "after", "100.0 (90-100)", "128"]),
    (tables.eval_view, MANY, ["before", "instructedit", "mend", "finetune", "gradient", "(86-100)"]),
    (tables.eval_view, CONTROLS, ["which instruction", "right", "wrong-task", "unseen"]),
    (tables.build_view, BUILD, ["900", "10 + 5", "skipped 3: no answer", "0123456789abcdef"]),
    (tables.train_view, TRAIN, ["people, places", "12.8 per second", "98.7%", "512.0 MB"]),
    (
        tables.apply_view,
        APPLY,
        [
            *("a.safetensors, b.safetensors", "adapter", "Sydney", "disturbed by", "55.3% of the change"),
            *("c.safetensors (45.6 KB, 2 edits)", "vllm serve BASE", "no: gpt2: no LoRA"),
        ],
    ),
    (tables.inspect_view, PATCH, ["Canberra", "changed", "same", "0.1235", "3 x 16", "F16", "0.9991", "ab12"]),
    (tables.inspect_view, STACK, ["1 a.safetensors", "Sydney", "alone", "together", "no"]),
    (tables.doctor_view, DOCTOR, ["float32", "not installed", "25.0 GB", "no GPU"]),
    (tables.demo_view, {"build": BUILD, "train": TRAIN, "edit": EDIT, "eval": EVAL}, ["ie build", "ie eval"]),
]


@pytest.mark.parametrize(("view", "data", "said"), CASES)
def test_views_fit_80_columns_and_cut_nothing(
    view: Callable[[Any], list[RenderableType]], data: dict[str, Any], said: list[str],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")  # a pipe's width must not depend on the terminal beside it
    Render().result(data, *view(data))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    assert "\x1b" not in shown
    for text in said:
        assert text in shown


@pytest.mark.parametrize(("view", "data", "said"), CASES)
def test_json_is_one_object_with_nothing_lost(
    view: Any, data: dict[str, Any], said: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Render(as_json=True).result(data, *view(data))
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(data))


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    Render(as_json=True).result({"a": math.nan, "b": [math.inf, (1.5, "ü")], 3: None})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, [1.5, "ü"]], "3": None}


@pytest.mark.parametrize("quiet", [False, True])
def test_notes_go_to_stderr(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    Render(quiet=quiet).note("on the way")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "" if quiet else "on the way\n")


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    console = Render().console()
    assert isinstance(console, Console)
    assert console.no_color


def test_rows_are_in_reading_order(capsys: pytest.CaptureFixture[str]) -> None:
    Render().result(EVAL, *tables.eval_view(EVAL))
    rows = tuple(f"{metric} " for metric in METRICS)
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if line.strip().startswith(rows)]
    assert lines[:4] == [
        ["reliability", "plain", "generated"],
        ["reliability", "plain", "forced"],
        ["reliability", "instructed", "generated"],
        ["reliability", "instructed", "forced"],
    ]


def test_a_missing_value_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    data = {**EVAL, "rows": [row("none", None), row("mend", math.nan)]}
    Render().result(data, *tables.eval_view(data))
    assert capsys.readouterr().out.count(" - ") >= 1


def test_fluency_is_no_share(capsys: pytest.CaptureFixture[str]) -> None:
    data = {**EVAL, "rows": [row("none", 612.34, "fluency", low=600.0, high=620.0)]}
    Render().result(data, *tables.eval_view(data))
    assert "612.3 (600-620)" in capsys.readouterr().out


def test_markdown_has_all_tables() -> None:
    text = to_markdown({**EVAL, "rows": [*EVAL["rows"], *CONTROLS["rows"]]})
    assert "## zsre (held out)\n" in text
    assert "## zsre (held out): which instruction\n" in text
    assert "| metric | query | decoding | n | before | after |\n| --- | --- | --- | ---: | ---: | ---: |\n" in text
    assert "| reliability | plain | generated | 128 | 0.0 (0-0) | 100.0 (90-100) |" in text


def _row(method: str, value: float, **more: object) -> dict[str, object]:
    base = {"task": "people", "method": method, "query": "plain", "decoding": "forced", "metric": "reliability"}
    return {**base, "value": value, "low": value - 0.05, "high": min(1.0, value + 0.05), "n": 40, **more}


@pytest.mark.parametrize(("low", "n", "marked"), [(0.1, 40, True), (-0.1, 40, False), (0.1, 3, False)])
def test_the_best_method_is_marked_only_where_the_interval_allows_it(low: float, n: int, marked: bool) -> None:
    gap = _row("instructedit", 0.3, versus="gradient", low=low, high=0.5, n=n)
    rows = [_row("none", 0.1), _row("instructedit", 0.9), _row("gradient", 0.6)]
    text = to_markdown({"base": "toy", "holdout": None, "rows": rows, "differences": [gap]})
    assert ("* 90.0" in text) is marked and "* 60.0" not in text and "* 10.0" not in text


def test_controls_of_several_editors_stand_apart() -> None:
    rows = [_row("instructedit", value, control="right", editor=name) for name, value in (("a", 0.9), ("b", 0.2))]
    rows += [_row("none", 0.0), *(_row("instructedit", 0.5, editor=name) for name in "ab")]
    gaps = [
        _row("instructedit", value, metric="harmonic-mean", control="right", versus="instructedit", editor=name,
             versus_editor=name, versus_control="none", low=value)
        for name, value in (("a", 0.0), ("b", 0.3))
    ]  # fmt: skip
    result = {"base": "toy", "holdout": None, "rows": rows, "differences": gaps}
    found = {section.title: section for section in sections(result)}
    for name, shown in (("a", "90.0"), ("b", "20.0")):
        line = found[f"people of instructedit {name}: which instruction"].lines[0]
        assert cell(line.cells["right"]).startswith(shown)
    less = found["people of instructedit b: right instruction less another, in points"].lines[0]
    assert cell(less.cells["none"]).startswith("+30.0")
    assert "no difference beyond chance" in summary_of(result)[-1]  # of the editor that the summary is about


def test_differences_asked_in_four_ways_fold_no_word(capsys: pytest.CaptureFixture[str]) -> None:
    ways = [(query, way) for query in ("plain", "instructed") for way in ("generated", "forced")]
    gaps = [
        _row("instructedit", -0.123, metric=metric, query=query, decoding=way, control="right", versus="instructedit",
             versus_control=other, low=-0.2, high=-0.1, n=150)
        for other in ("none", "wrong-task", "random") for metric in ("generalization", "locality-known")
        for query, way in ways
    ]  # fmt: skip
    rows = [_row("instructedit", 0.5, control="right"), _row("instructedit", 0.5)]
    Render().result({}, *tables.eval_view({"base": "toy", "rows": rows, "differences": gaps}))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "generalization  wrong-task  150" in said and "locality-known  wrong-task  150" in said
    assert "(-20..-10)" in said


def test_the_summary_counts_what_is_forced_alone() -> None:
    """Opinions have no generated answers to other wordings."""
    rows = [_row("instructedit", 1.0, decoding=way) for way in ("generated", "forced")]
    rows += [_row("instructedit", 0.1, metric="generalization"), _row("none", 0.0)]
    lines = summary_of({"rows": rows})
    assert "no task at 90 %" in lines[0]
    assert any(line.startswith("generalization is below 90 % for people") for line in lines)


def test_the_summary_says_what_works_what_does_not_and_what_to_try() -> None:
    rows = [_row("none", 0.0), _row("instructedit", 1.0), _row("instructedit", 0.5, metric="locality")]
    rows += [_row("instructedit", 1.0, task="places")]
    lines = summary_of({"rows": rows})
    assert lines[0].startswith("instructedit, plain and forced: places at 90 %")
    assert any(line.startswith("locality is below 90 % for people") and "raise" in line for line in lines)
    assert not any("portability" in line for line in lines)
    follows = _row("instructedit", 0.1, metric="portability", task="places")
    assert "needs edits of its own" in summary_of({"rows": [*rows, follows]})[-1]
    gap = _row("instructedit", 0.0, metric="harmonic-mean", control="right", versus_control="none", low=-0.1)
    assert "no difference beyond chance" in summary_of({"rows": rows, "differences": [gap]})[-1]
    assert "edits better" in summary_of({"rows": rows, "differences": [{**gap, "low": 0.01}]})[-1]
    assert len(summary_of({"rows": rows, "differences": [gap]})) <= 6
    assert "No editing method" in summary_of({"rows": [_row("none", 0.0)]})[0]


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for term, live in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", term)
        assert Render().live is live
