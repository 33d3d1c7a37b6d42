from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ie.cli.app import app
from ie.cli.render import reporting
from typer.testing import CliRunner

from ie.errors import BaseMismatchError, DataError, EditFailedError, IEError

ONE = ("--instruction", "I", "--prompt", "P", "--target", "T")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nonsense"], "nonsense"),
        (["train", "--stepz", "3"], "--stepz"),
        (["train", "--steps", "0"], "--steps"),
        (["train", "--method", "rome"], "rome"),
        (
            ["train", "--quant", "3bit"],
            "invalid value for '--quant': '3bit' is not one of 'auto', '8bit', '4bit', 'none'",
        ),
        (["train", "--model", "./nowhere"], "./nowhere"),
        (["train", "--data", "nowhere"], "no dataset at nowhere"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["edit", "--prompt", "a", "--target", "b", "--instruction", "c"], "no editor at ie-editor"),
        (["apply-patch"], "PATCH"),
        (["apply-patch", "nowhere.safetensors"], "nowhere.safetensors"),
        (["eval"], "no dataset at ie-data"),
        (["eval", "--methods", "none,rome"], "rome"),
        (["inspect"], "PATH"),
        (["inspect", "nowhere"], "nowhere"),
    ],
)
def test_usage_errors(args: list[str], said: str, run: Any, workdir: Path) -> None:
    result = run(*args, code=2)
    assert said in result.stderr.splitlines()[0]
    assert result.stderr.splitlines()[1].startswith("hint: ") or args == ["inspect", "nowhere"]
    assert list(workdir.iterdir()) == []


def test_build_refuses_an_output_that_exists(run: Any, dataset_folder: Path) -> None:
    before = (dataset_folder / "dataset.json").read_bytes()
    assert "--force" in run("build", code=2).stderr
    assert (dataset_folder / "dataset.json").read_bytes() == before


def test_train_refuses_an_output_that_exists(run: Any, dataset_folder: Path, editor_folder: Path) -> None:
    assert "--out ie-editor exists" in run("train", code=2).stderr


def test_train_names_resume_where_a_run_was_stopped(run: Any, dataset_folder: Path, editor_folder: Path) -> None:
    """Ctrl-C leaves the best editor so far beside the checkpoints: --force would lose them."""
    Path("ie-editor.training/checkpoint-0000007").mkdir(parents=True)
    said = run("train", code=2).stderr
    assert "unfinished run" in said and "hint: give --resume" in said


@pytest.mark.parametrize("name", ["lama", "~/none", "a/b/c", "owner/", "./none"])
def test_a_model_that_is_nowhere_is_refused_at_once(run: Any, name: str) -> None:
    for args in (("train",), ("train", "--dry-run"), ("doctor",)):
        assert "neither a folder nor a hub id" in run(*args, "--model", name, code=2).stderr
    assert not Path("ie-data").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--tasks", "people,nonsense"], "--tasks nonsense: unknown task"),
        (["--holdout", "nonsense"], "--holdout nonsense: unknown task"),
        (["--tasks", "people,zsre"], "zsre is in --tasks and held out"),
        (["--tasks", "people", "--holdout", "people"], "people is in --tasks and held out"),
        (["--holdout", "people,zsre"], "no task is left"),
        (["--tasks", "people,,zsre"], "expected names with commas"),
    ],
)
def test_train_checks_tasks(args: list[str], said: str, run: Any, dataset_folder: Path) -> None:
    assert said in run("train", *args, code=2).stderr


def test_config_names_an_unknown_setting(run: Any, dataset_folder: Path) -> None:
    Path("settings.yaml").write_text("stepz: 3\nsteps: 10\n")
    assert "stepz" in run("train", "--config", "settings.yaml", code=2).stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1\n- 2\n", "expected a mapping of flags to values"),
        ("steps: [", "no YAML"),
        ("steps: 0\n", "steps"),
        ("method: rome\n", "method"),
        ("steps: many\n", "steps"),
    ],
)
def test_config_is_checked_as_flags_are(text: str, said: str, run: Any, dataset_folder: Path) -> None:
    Path("settings.yaml").write_text(text)
    assert said in run("train", "--config", "settings.yaml", code=2).stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--prompt", "a"], "missing --instruction, --target"),
        (["--instruction", "i", "--prompt", "a", "--target", " "], "--target: empty"),
        (["--from", "edits.jsonl", "--prompt", "a"], "--from cannot be used with"),
        (["--from", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--instruction", "i", "--prompt", "a", "--target", "b", "--model", "a/b/c"], "a/b/c"),
    ],
)
def test_edit_checks_its_texts(args: list[str], said: str, run: Any, editor_folder: Path) -> None:
    assert said in run("edit", *args, code=2).stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no edits"),
        ('{"prompt": "a", "target": "b", "instruction": "i"}\n{"prompt":\n', "line 2: broken JSON"),
        ('{"prompt": "a", "target": "", "instruction": "i"}\n', "target is ''"),
        ('{"prompt": "a", "target": "b"}\n', "instruction is missing"),
        ('{"prompt": "a", "target": "b", "aim": "c"}\n', "unknown fields: aim"),
        ('{"prompt": "a", "target": "b", "instruction": "i", "probes": "x"}\n', "probes must be a list"),
        ('{"prompt": "a", "target": "b", "task": "x"}\n', "edit 1: no template of task 'x'"),
        ("[1]\n", "line 1"),
    ],
)
def test_edit_from_a_broken_file(text: str, said: str, run: Any, editor_folder: Path) -> None:
    Path("edits.jsonl").write_text(text)
    assert said in run("edit", "--from", "edits.jsonl", code=2).stderr


def test_force_replaces_only_what_it_makes(
    run: Any, dataset_folder: Path, editor_folder: Path, patch_file: Path
) -> None:
    """All that a folder holds would be gone."""
    for args in (("train", "--out"), ("apply-patch", patch_file, "--merge"), ("apply-patch", patch_file, "--peft")):
        said = run(*args, dataset_folder, "--force", code=2).stderr
        assert "holds other things" in said and (dataset_folder / "dataset.json").is_file()
        assert "is a file, expected a folder" in run(*args, patch_file, "--force", code=2).stderr


def test_resume_and_demo_replace_no_other_folder(run: Any, dataset_folder: Path) -> None:
    assert "holds other things" in run("train", "--out", "ie-data", "--resume", code=2).stderr
    dataset_folder.rename("ie-editor")
    assert "holds other things" in run("demo", "--out", ".", "--force", code=2).stderr


def test_a_file_is_not_written_over_a_folder(run: Any, dataset_folder: Path, editor_folder: Path) -> None:
    Path("empty").mkdir()
    for args in (("eval", "--out"), ("eval", "--markdown"), ("edit", *ONE, "--out")):
        assert "is a folder, expected a file" in run(*args, "empty", "--force", code=2).stderr


def test_a_report_is_written_to_two_files(run: Any, dataset_folder: Path, editor_folder: Path) -> None:
    assert "files of their own" in run("eval", "--out", "r", "--markdown", "./r", code=2).stderr


def test_what_a_launcher_says_is_checked(run: Any, monkeypatch: pytest.MonkeyPatch, dataset_folder: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    assert "expected a number" in run("train", "--data", "ie-data", "--holdout", "none", code=2).stderr
    assert run("--version").stdout


def test_templates_are_for_a_task(run: Any, editor_folder: Path) -> None:
    assert "--templates needs --task" in run("edit", *ONE, "--templates", "mine", code=2).stderr


def test_apply_patch_writes_nothing_twice_at_one_place(run: Any, patch_file: Path) -> None:
    said = run("apply-patch", patch_file, "--merge", "made", "--peft", "./made", code=2).stderr
    assert "places of their own" in said and not Path("made").exists()
    said = run("apply-patch", patch_file, "--out", "made/p.safetensors", "--merge", "made", code=2).stderr
    assert "none below another" in said  # a merge replaces its whole folder


def test_apply_patch_refuses_a_truncated_patch(run: Any, patch_file: Path) -> None:
    patch_file.write_bytes(patch_file.read_bytes()[:-10])
    assert "truncated" in run("apply-patch", patch_file, code=2).stderr


def test_eval_refuses_an_editor_that_trained_on_the_holdout(
    run: Any, dataset_folder: Path, editor_folder: Path
) -> None:
    assert "was trained on it" in run("eval", "--holdout", "people", code=2).stderr


def test_editor_json_is_broken(run: Any, editor_folder: Path) -> None:
    (editor_folder / "editor.json").write_text('{\n"method": \n')
    assert "editor.json, line" in run("inspect", editor_folder, code=2).stderr


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (IEError("it failed"), 1, ["error: it failed"]),
        (DataError("bad file", hint="mend it"), 2, ["error: bad file", "hint: mend it"]),
        (EditFailedError("no"), 3, ["error: no"]),
        (BaseMismatchError("another base"), 4, ["error: another base"]),
        (KeyboardInterrupt(), 130, ["error: interrupted"]),
        (KeyboardInterrupt("kept at x"), 130, ["error: interrupted", "hint: kept at x"]),
    ],
)
def test_exit_codes(error: BaseException, code: int, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, reporting(json=False, quiet=False, debug=False):
        raise error
    assert end.value.code == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == lines


@pytest.mark.parametrize("debug", [False, True])
def test_an_unexpected_error_is_one_line_unless_debugged(debug: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, reporting(json=True, quiet=True, debug=debug):
        raise RuntimeError("first line\nsecond line")
    assert end.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: RuntimeError: first line" in captured.err
    assert ("Traceback" in captured.err) is debug
    assert ("--debug" in captured.err.splitlines()[-1]) is not debug


def test_an_error_exits_rather_than_crashes(workdir: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", "nowhere"], prog_name="ie")
    assert isinstance(result.exception, SystemExit)
