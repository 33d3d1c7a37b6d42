"""What the commands hand to the library, and what they make of its answers. The library itself is played by fakes."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ie.cli.progress import clock, event_line


@dataclass
class Event:
    kind: str
    text: str = ""
    step: int = 0
    n_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_left: float | None = None


EVENTS = [
    Event("note", "building episodes"),
    Event("step", "", 1, 20, {"loss": 1.23456}, 1.0, 75.0),
    Event("validation", "best so far", 10, 20, {"reliability": 0.5}),
    Event("done", "stopped early"),
]
TRAINED = {
    "editor": "ie-editor", "base": "toy", "tasks": ["people"], "holdout": "zsre", "steps": 20, "episodes": 320,
    "seconds": 3.0, "episodes_per_second": 100.0, "peak_memory_bytes": 1000,
    "prefix_kept": {"texts": 12, "memory_bytes": 100, "file_bytes": 0},
    "validation": {"reliability": 0.9, "generalization": 0.8, "locality": 0.95},
}  # fmt: skip
EDITED = {
    "patch": "patch.safetensors", "bytes": 100, "rank": 3, "dtype": "float16", "energy_kept": 0.999, "took": True,
    "prompt": "P", "target": "T", "before": "B", "after": "T", "target_probability": {"before": 0.1, "after": 0.9},
    "probes": [], "seconds": 0.1,
}  # fmt: skip
APPLIED = {
    "patches": [{
        "patch": "patch.safetensors", "name": "patch.safetensors", "prompt": "P", "target": "T", "before": "B",
        "after": "T", "took": True, "took_alone": True,
    }],
    "took": True, "disturbed": [], "previews": [], "out": None, "merged": None, "peft": "x", "checks": [],
}  # fmt: skip
REPORT = {
    "holdout": "zsre", "base": "toy", "editor": "ie-editor",
    "rows": [{
        "task": "zsre", "method": "instructedit", "query": "plain", "decoding": "forced", "metric": "locality",
        "value": 0.9, "low": 0.8, "high": 1.0, "n": 10,
    }],
}  # fmt: skip


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Put a module with the given names in place of one of the library's."""

    def put(name: str, **names: Any) -> None:
        module = ModuleType(name)
        module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, module)

    yield put


@pytest.fixture
def trained(library: Callable[..., None]) -> dict[str, Any]:
    """A training library that notes its settings and reports EVENTS."""
    seen: dict[str, Any] = {}

    def train(settings: Any, *, on_event: Callable[[Event], None]) -> dict[str, Any]:
        seen.update(settings.model_dump(exclude_unset=True))
        for event in EVENTS:
            on_event(event)
        return TRAINED

    from ie.training import config, settings

    library("ie.training", train=train, __path__=[])
    library("ie.training.settings", TrainSettings=settings.TrainSettings)
    library("ie.training.config", **{name: getattr(config, name) for name in config.__all__})
    return seen


def test_train_passes_the_flags_on(run: Any, trained: dict[str, Any], dataset_folder: Path) -> None:
    result = run("train", "--steps", "20", "--quant", "8bit", "--no-balance", "--batch-size", "4", "--json")
    assert json.loads(result.stdout) == TRAINED
    assert trained["steps"] == 20
    assert (trained["quant"], trained["balance"], trained["batch_size"]) == ("8bit", False, 4)
    assert (trained["holdout"], trained["data"], trained["out"]) == (("zsre",), Path("ie-data"), Path("ie-editor"))
    assert not {"tasks", "minutes"} & set(trained)  # left to the library's defaults
    assert result.stderr == "building episodes\nstep 10/20 validation  best so far  reliability 0.500\nstopped early\n"


def test_train_quietly(run: Any, trained: dict[str, Any], dataset_folder: Path) -> None:
    result = run("train", "--quiet", "--holdout", "none", "--tasks", "people,zsre")
    assert result.stderr == ""
    assert "90.0%" in result.stdout
    assert (trained["holdout"], trained["tasks"]) == ((), ("people", "zsre"))


def test_config_is_the_default_and_flags_win(run: Any, trained: dict[str, Any], dataset_folder: Path) -> None:
    Path("settings.yaml").write_text("steps: 30\nbatch-size: 2\nrank: 8\ntasks: [people]\nholdout: none\nseed: 5\n")
    run("train", "--config", "settings.yaml", "--steps", "20")
    assert (trained["steps"], trained["batch_size"], trained["rank"], trained["seed"]) == (20, 2, 8, 5)
    assert (trained["tasks"], trained["holdout"]) == (("people",), ())


@pytest.mark.parametrize("text", ["rank: -1\n", "rank: many\n"])
def test_config_settings_without_a_flag_are_checked(
    text: str, run: Any, trained: dict[str, Any], dataset_folder: Path
) -> None:
    Path("settings.yaml").write_text(text)
    assert "--config settings.yaml: rank" in run("train", "--config", "settings.yaml", code=2).stderr
    assert trained == {}


def test_train_builds_the_default_dataset_first(run: Any, trained: dict[str, Any], library: Any) -> None:
    def build(out: Path) -> None:
        out.mkdir()
        (out / "dataset.json").write_text('{"tasks": {"people": {}, "zsre": {}}}')

    library("ie.data.build", build=build)
    result = run("train")
    assert result.stderr.startswith("no dataset at ie-data: building the default one first\n")
    assert Path("ie-data/dataset.json").exists()


def test_interrupted_training(run: Any, trained: dict[str, Any], library: Any, dataset_folder: Path) -> None:
    def train(settings: Any, *, on_event: Any) -> None:
        raise KeyboardInterrupt("the best editor so far is at ie-editor")

    library("ie.training", train=train, __path__=[])
    result = run("train", code=130)
    assert result.stderr == "error: interrupted\nhint: the best editor so far is at ie-editor\n"


def edit_library(library: Callable[..., None], result: dict[str, Any]) -> list[Any]:
    seen: list[Any] = []

    def edit(settings: Any) -> dict[str, Any]:
        seen.append(settings)
        return result

    library("ie.editor", __path__=[])
    settings = SimpleNamespace(model_validate=lambda values: SimpleNamespace(**values))
    library("ie.editor.editing", edit=edit, EditSettings=settings)
    return seen


ONE = ("--instruction", "I", "--prompt", "P", "--target", "T")


def test_edit(run: Any, library: Any, editor_folder: Path) -> None:
    seen = edit_library(library, EDITED)
    result = run("edit", *ONE, "--probe", "A", "--probe", "B", "--json")
    assert json.loads(result.stdout) == EDITED
    request = {"instruction": "I", "prompt": "P", "target": "T", "probes": ("A", "B")}
    assert seen[0].requests == [request]
    assert (seen[0].out, seen[0].many, seen[0].model) == (Path("patch.safetensors"), False, None)


def test_a_probe_that_moved_is_followed_by_what_to_try(run: Any, library: Any, editor_folder: Path) -> None:
    probes = [
        {"prompt": "A", "before": "X", "after": "X", "changed": False},
        {"prompt": "It's B", "before": "Y", "after": "T", "changed": True},
    ]
    edit_library(library, {**EDITED, "probes": probes})
    result = run("edit", *ONE, "--probe", "A", "--probe", "It's B")
    command = result.stderr.split("`")[1]
    assert shlex.split(command)[:3] == ["ie", "apply-patch", "patch.safetensors"]
    assert shlex.split(command)[3:] == ["--scale", "0.5", "--prompt", "It's B"]
    assert "hint" not in run("edit", *ONE, "--probe", "A", "--quiet", "--force").stderr


def test_edits_from_a_file(run: Any, library: Any, editor_folder: Path) -> None:
    seen = edit_library(library, {"edits": [EDITED, EDITED]})
    lines = [{"prompt": "P", "target": "T"}, {"prompt": "Q", "target": "U", "instruction": "J", "probes": ["B"]}]
    Path("edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = run("edit", "--from", "edits.jsonl", "--instruction", "I", "--probe", "A")
    assert "2 of 2 edits took" in result.stdout
    assert [request["instruction"] for request in seen[0].requests] == ["I", "J"]
    assert [request["probes"] for request in seen[0].requests] == [("A",), ("A", "B")]
    assert (seen[0].out, seen[0].many) == (Path("patches"), True)


def test_a_named_task_lays_the_instruction_out_as_training_had_it(run: Any, library: Any, editor_folder: Path) -> None:
    from ie.data.templates import load_templates

    general, people = (load_templates()[task] for task in ("general", "people"))
    seen = edit_library(library, {"edits": [EDITED] * 3})
    lines = [{"prompt": "P", "target": "T"}, {"prompt": "Q", "target": "U", "instruction": "J", "task": "people"}]
    Path("edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run("edit", "--from", "edits.jsonl", "--task", "general")
    told = ["Task: General knowledge\nDescription: " + general.about, "Task: People\nDescription: J"]
    assert [request["instruction"] for request in seen[0].requests] == told
    assert told[1] == people.laid_out("J")
    assert "no template of task 'x'" in run("edit", *ONE, "--task", "x", code=2).stderr


def test_an_edit_that_does_not_take_is_shown_and_ends_with_3(workdir: Path, library: Any, editor_folder: Path) -> None:
    from ie.cli.app import app
    from typer.testing import CliRunner

    moved = [{"prompt": "A", "before": "X", "after": "Y", "changed": True}]  # no reason to suggest a weaker edit
    edit_library(library, {**EDITED, "took": False, "after": "B", "probes": moved})
    result = CliRunner().invoke(app, ["edit", *ONE, "--json"], prog_name="ie")
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 3
    assert json.loads(result.stdout)["took"] is False
    assert result.stderr.startswith("error: the edit did not take: 'P' gives 'B', expected 'T'\nhint: ")


def test_mend_needs_no_instruction(run: Any, library: Any, editor_folder: Path) -> None:
    seen = edit_library(library, EDITED)
    (editor_folder / "editor.json").write_text('{"method": "mend"}')
    run("edit", "--prompt", "P", "--target", "T")
    assert seen[0].requests[0]["instruction"] is None


def test_apply_patch(run: Any, library: Any, patch_file: Path) -> None:
    seen: dict[str, Any] = {}

    def apply(patches: list[Path], **options: Any) -> dict[str, Any]:
        seen.update(options, patches=patches)
        return APPLIED

    library("ie.patch.apply", apply_patch=apply)
    result = run("apply-patch", patch_file, "--prompt", "P", "--scale", "0.5", "--peft", "x")
    assert "peft adapter" in result.stdout
    assert (seen["patches"], seen["prompts"], seen["scale"], seen["merge"]) == ([patch_file], ("P",), 0.5, None)


def test_eval(run: Any, library: Any, dataset_folder: Path, editor_folder: Path) -> None:
    seen: dict[str, Any] = {}

    def evaluate(**options: Any) -> dict[str, Any]:
        seen.update(options)
        return REPORT

    library("ie.evaluation", evaluate=evaluate, __path__=[])
    result = run("eval", "--holdout", "zsre", "--out", "r.json", "--markdown", "r.md", "--limit", "9", "--json")
    assert json.loads(result.stdout) == json.loads(Path("r.json").read_text()) == REPORT
    assert "## zsre (held out)" in Path("r.md").read_text()
    assert (seen["editors"], seen["holdout"], seen["limit"]) == ((Path("ie-editor"),), "zsre", 9)
    run("eval", "--out", "r.json", code=2)


def test_a_report_that_cannot_be_written_is_shown(
    workdir: Path, library: Any, dataset_folder: Path, editor_folder: Path
) -> None:
    from ie.cli.app import app
    from typer.testing import CliRunner

    library("ie.evaluation", evaluate=lambda **options: REPORT, __path__=[])
    result = CliRunner().invoke(app, ["eval", "--out", "/proc/none/r.json", "--json"], prog_name="ie")
    assert result.exit_code == 2 and "cannot be written" in result.stderr
    assert json.loads(result.stdout) == REPORT


def test_a_demo_whose_edit_does_not_take_ends_with_3(workdir: Path, library: Any) -> None:
    from ie.cli.app import app
    from typer.testing import CliRunner

    library("ie.demo", run=lambda **options: {"edit": {**EDITED, "took": False}})
    result = CliRunner().invoke(app, ["demo"], prog_name="ie")
    assert result.exit_code == 3 and "ie edit" in result.stdout and "did not take" in result.stderr


def test_demo(run: Any, library: Any) -> None:
    def run_demo(*, on_note: Any, on_event: Any, **options: Any) -> dict[str, Any]:
        on_note("first, a dataset")
        on_event(EVENTS[0])
        return {"train": TRAINED, "edit": EDITED, "eval": REPORT}

    library("ie.demo", run=run_demo)
    result = run("demo")
    assert result.stderr == "first, a dataset\nbuilding episodes\n"
    assert "ie train" in result.stdout


def test_doctor(run: Any) -> None:
    shown = json.loads(run("doctor", "--device", "cpu", "--quant", "4bit", "--json").stdout)
    assert shown["versions"]["torch"]
    assert (shown["device"], shown["quant"]) == ("cpu", "4bit")
    assert shown["reason"] and shown["memory_bytes"] > 0 and shown["cores"] > 0
    assert "Will be used" in run("doctor").stdout
    elsewhere = json.loads(run("doctor", "--device", "cuda:99", "--json").stdout)
    assert (elsewhere["device"], elsewhere["quant"], elsewhere["gpu"], elsewhere["bf16"]) == (
        *("cuda:99", "8bit"), None, None
    )  # fmt: skip


def test_event_lines() -> None:
    assert event_line(EVENTS[1]) == "step 1/20  loss 1.235  1:15 left"
    assert event_line(Event("done", "", 1500, 1500, {"reliability": 0.9}, 130.0)) == "1500 steps in 2:10"
    figures = {"edit_loss": 12.3456, "locality_loss": 0.01, "episodes_per_second": 512.34}
    line = event_line(Event("step", "", 1499, 1500, figures, 1.0, 3723))
    assert line == "step 1499/1500  edit 12.346  locality 0.010  512.3 episodes/s  1:02:03 left"
    assert len(line) <= 75  # beside the spinner
    assert [clock(seconds) for seconds in (7.4, 750, 3723)] == ["0:07", "12:30", "1:02:03"]


def test_the_defaults_that_help_shows_are_the_librarys(run: Any) -> None:
    from ie.training.settings import TrainSettings

    shown = " ".join(run("train", "--help").stdout.split())
    for name in ("steps", "batch_size"):
        assert f"[default: ({TrainSettings.model_fields[name].default});" in shown


def test_a_setting_that_the_library_refuses(run: Any, trained: dict[str, Any], dataset_folder: Path) -> None:
    Path("settings.yaml").write_text("nonsense: 1\n")
    assert "nonsense" in run("train", "--config", "settings.yaml", code=2).stderr.splitlines()[0]
    assert trained == {}
