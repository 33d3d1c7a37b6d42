"""A figure below its aim is named; figures that reach their aims give no line."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.verdict import AIMS, CONFLICTING, JUDGED, SPECIALISTS, shortfalls, tables

OTHERS = ("none", "wrong-task", "random", "unseen")


def row(task: str, metric: str, value: float, decoding: str = "forced", **names: Any) -> dict[str, Any]:
    return {"task": task, "metric": metric, "query": "plain", "decoding": decoding, "value": value, **names}


def reports() -> dict[str, Any]:
    """What `ie eval` says of seed 0 where every aim is just reached."""
    own: dict[str, Any] = {"method": "instructedit", "editor": "instructedit-0"}
    compared = [row(task, metric, aim, **own) for task, aims in AIMS.items() for metric, aim in aims.items()]
    compared += [row(task, "reliability", AIMS[task]["reliability"] - 0.07, "generated", **own) for task in JUDGED]
    others = [
        *({"versus": "finetune", "value": 0.1, "high": 0.2}, {"versus": "gradient", "value": 0.1, "high": 0.2}),
        {"versus": "mend", "versus_editor": "mend-0", "value": -0.02, "high": 0.01},
    ]
    alone = {"versus": "instructedit", "value": -0.02, "high": 0.0}
    gaps = [row(task, "harmonic-mean", **{**own, **other}) for task in JUDGED for other in others]
    gaps += [row(task, "harmonic-mean", **own, **alone, versus_editor=f"only-{task}-0") for task in SPECIALISTS]
    told = {control: {"control": control} for control in ("right", *OTHERS)}
    controls = [
        row(task, metric, 0.9, **names)
        for task in JUDGED
        for metric in ("reliability", "generalization")
        for names in told.values()
    ]
    less = {other: {"control": "right", "versus_control": other, "low": 0.01, "high": 0.03} for other in OTHERS}
    between = [row(task, "harmonic-mean", 0.02, **names) for task in JUDGED for names in less.values()]
    decided = [row(task, metric, 0.8, **names) for task, metric in CONFLICTING.items() for names in told.values()]
    won = [row(task, metric, 0.2, **names) for task, metric in CONFLICTING.items() for names in less.values()]
    return {
        "compared": {"rows": compared, "differences": gaps},
        "controls": {"rows": controls, "differences": between},
        "conflicting": {"rows": decided, "differences": won},
    }


def test_aims_that_are_just_reached_are_not_named() -> None:
    assert list(shortfalls({0: reports()})) == []


@pytest.mark.parametrize(
    ("report", "part", "which", "change", "said"),
    [
        ("compared", "rows", {"task": "zsre", "metric": "locality"}, {"value": 0.94}, "zsre locality 0.940, aim 0.95"),
        ("compared", "rows", {"task": "recent", "decoding": "generated"}, {"value": 0.86}, "recent generated"),
        ("compared", "differences", {"versus": "finetune"}, {"value": 0.09}, "+0.090 of finetune's"),
        ("compared", "differences", {"versus": "mend"}, {"high": -0.001}, "below mend"),
        ("compared", "differences", {"versus_editor": "only-recent-0"}, {"value": -0.03}, "-0.030 of only-recent-0's"),
        ("compared", "differences", {"versus_editor": "only-counterfact-0"}, {"value": -0.03}, "of only-counterfact"),
        ("controls", "rows", {"control": "unseen", "metric": "reliability"}, {"value": 0.88}, "under unseen wordings"),
        ("conflicting", "differences", {"versus_control": "wrong-task"}, {"low": 0.0}, "not worse beyond chance"),
    ],
)
def test_what_stays_below_is_named(
    report: str, part: str, which: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    found = reports()
    hit = next(one for one in found[report][part] if which.items() <= one.items())
    hit.update(change)
    (line,) = shortfalls({0: found})
    assert line.startswith("seed 0: ") and said in line


@pytest.mark.parametrize(
    ("report", "part", "which"),
    [
        ("compared", "rows", {"task": "zsre", "metric": "locality"}),
        ("compared", "rows", {"task": "recent", "decoding": "generated"}),
        ("compared", "differences", {"task": "zsre", "versus": "gradient"}),
        ("compared", "differences", {"task": "counterfact", "versus": "mend"}),
        ("compared", "differences", {"versus_editor": "only-counterfact-0"}),
        ("controls", "rows", {"task": "recent", "metric": "reliability", "control": "unseen"}),
        ("conflicting", "differences", {"versus_control": "wrong-task"}),
    ],
)
def test_what_was_not_measured_is_not_passed_over(report: str, part: str, which: dict[str, Any]) -> None:
    found = reports()
    rows = found[report][part]
    rows.remove(next(one for one in rows if which.items() <= one.items()))
    with pytest.raises(KeyError):
        list(shortfalls({0: found}))


def test_tables_say_what_was_measured_and_what_is_beyond_chance() -> None:
    shown = "\n".join(tables({0: reports()}))
    assert "| 0 | zsre | instructedit-0 | 93.0 | 88.0 | 95.0 | - | - | 86.0 |" in shown
    assert "**-2.0 (-3.0 to -1.0)**" in shown
    assert "| every-wording, generalization | 0 | 80.0 | 80.0 | 80.0 | 80.0 | **+20.0 (1.0 to 3.0)** |" in shown
