"""The commands one after the other, for real: on the bundled base, and quantised on a tiny GPT-2."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ie.cli.app import app
from typer.testing import CliRunner

from ie.data.dataset import Dataset
from ie.data.record import SPLITS
from ie.source import TOY_FOLDER

TEMPLATES = Path(__file__).parents[2] / "templates"
QUICK = "validate_every: 4\nn_validation: 8\nn_fit: 16\nbatch_size: 4\nrank: 16\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small dataset and an editor trained for a few steps on the bundled base."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "quick.yaml").write_text(QUICK)
    ie("build", "--out", folder / "data", "--limit", 40)
    ie("train", "--data", folder / "data", "--out", folder / "editor", "--steps", 8, "--config", folder / "quick.yaml")
    return folder


def ie(*args: object, code: int = 0) -> Any:
    """Run `ie` and return its JSON; other exit codes than the one expected fail the test."""
    result = CliRunner().invoke(app, [*map(str, args), "--json"], prog_name="ie")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if result.stdout else result.stderr


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


def edit_args(place: Path) -> list[object]:
    record = Dataset.load(place / "data").records("test", ["people"])[0]
    request = ("--instruction", record.instruction.heldout[0], "--prompt", record.prompt, "--target", record.target)
    return ["edit", *request, "--editor", place / "editor"]


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    """All of it, with a training of a second, after which the edit need not take."""
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--minutes", "0.02", "--json"], prog_name="ie")
    assert result.exit_code in (0, 3), result.output
    found = json.loads(result.stdout)
    assert list(found) == ["build", "train", "edit", "apply-patch", "eval"]
    assert found["eval"]["holdout"] == "zsre" and {row["task"] for row in found["eval"]["rows"]} >= {"people", "zsre"}
    assert (tmp_path / "ie-editor" / "editor.json").is_file() and (tmp_path / "patch.safetensors").is_file()
    assert [line[:3] for line in result.stderr.splitlines() if line[1:3] == "/5"] == [f"{n}/5" for n in range(1, 6)]


@pytest.mark.slow
def test_every_step_on_the_bundled_base(place: Path, tmp_path: Path) -> None:
    base_before = contents(TOY_FOLDER)
    patch = tmp_path / "patch.safetensors"
    made = ie(*edit_args(place), "--probe", "The capital of France is", "--out", patch)
    assert made["took"] and made["after"] == made["target"] != made["before"]
    assert made["target_probability"]["after"] > made["target_probability"]["before"]
    assert made["bytes"] == patch.stat().st_size and made["rank"] >= 1 and len(made["probes"]) == 1
    assert made["kind"] == "people"

    applied = ie("apply-patch", patch, "--prompt", made["prompt"], "--merge", tmp_path / "m", "--peft", tmp_path / "p")
    assert applied["took"] and applied["previews"][1]["after"] == made["target"]
    assert applied["merged"]["took"] and applied["merged"]["answers"] == [made["target"]]
    shown = ie("inspect", patch)
    assert shown["kind"] == "patch" and shown["base"]["id"] == "toy" and shown["editor"]
    assert shown["templates"] == Dataset.load(place / "data").info["templates"] != ""
    assert shown["probes"][0]["prompt"] == "The capital of France is"
    assert all(entry["norm"] > 0 and entry["rank"] >= 1 for entry in shown["modules"].values())

    report = ie("eval", "--data", place / "data", "--editor", place / "editor", "--limit", 2, "--holdout", "zsre")
    keys = {"task", "method", "query", "decoding", "metric", "value", "low", "high", "n"}
    assert all(keys <= row.keys() for row in report["rows"])
    assert {row["task"] for row in report["rows"]} == {"general", "people", "places", "convsent", "zsre"}
    assert {row["method"] for row in report["rows"]} == {"none", "instructedit"}
    assert contents(TOY_FOLDER) == base_before


def test_many_edits_from_a_file(place: Path, tmp_path: Path) -> None:
    records = Dataset.load(place / "data").records("test", ["people", "places"])[:3]
    lines = [
        {"instruction": record.instruction.heldout[0], "prompt": record.prompt, "target": record.target}
        for record in records
    ]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ["edit", "--from", tmp_path / "edits.jsonl", "--editor", place / "editor", "--out", tmp_path / "patches"]
    result = CliRunner().invoke(app, [*map(str, args), "--json"], prog_name="ie")
    assert result.exit_code in (0, 3)  # 3: an edit of an editor trained for seconds need not take
    edits = json.loads(result.stdout)["edits"]
    assert [edit["prompt"] for edit in edits] == [line["prompt"] for line in lines]
    assert all(Path(edit["patch"]).is_file() for edit in edits)
    (tmp_path / "patches" / "mine.safetensors").touch()
    (tmp_path / "edits.jsonl").write_text(json.dumps({**lines[1], "target": f" {lines[1]['target']} "}) + "\n")
    result = CliRunner().invoke(app, [*map(str, args), "--force", "--json"], prog_name="ie")
    (edit,) = json.loads(result.stdout)["edits"]
    assert edit["target"] == lines[1]["target"]  # the space before it is not part of it
    left = {path.name for path in (tmp_path / "patches").iterdir()}
    assert left == {Path(edit["patch"]).name, "mine.safetensors"}  # none of the earlier ones


@pytest.mark.parametrize("flag", ["--joint", "--sequential"])
def test_many_edits_in_one_patch(flag: str, place: Path, tmp_path: Path) -> None:
    """What the patch says of its edits is what is seen when it is read and applied; a stack can be taken apart."""
    records = Dataset.load(place / "data").records("test", ["people", "places"])[:3]
    lines = [
        {"instruction": record.instruction.heldout[0], "prompt": record.prompt, "target": record.target}
        for record in records
    ]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    patch = tmp_path / "many.safetensors"
    args = ["edit", "--from", tmp_path / "edits.jsonl", flag, "--editor", place / "editor", "--out", patch]
    result = CliRunner().invoke(app, [*map(str, args), "--json"], prog_name="ie")
    assert result.exit_code in (0, 3), result.output  # 3: an edit of an editor trained for seconds need not take
    made = json.loads(result.stdout)
    assert [edit["prompt"] for edit in made["edits"]] == [line["prompt"] for line in lines]
    assert {edit["patch"] for edit in made["edits"]} == {made["patch"]} == {str(patch)}
    assert ("still_take" in made) is (flag == "--sequential")

    shown = ie("inspect", patch)
    assert [parent["info"]["target"] for parent in shown["parents"]] == [line["target"] for line in lines]
    assert [parent["took"] for parent in shown["parents"]] == [edit["took"] for edit in made["edits"]]
    prompts = [argument for line in lines for argument in ("--prompt", line["prompt"])]
    result = CliRunner().invoke(app, ["apply-patch", str(patch), *prompts, "--json"], prog_name="ie")
    previews = {seen["prompt"]: seen["after"] for seen in json.loads(result.stdout)["previews"]}
    # A preview awaits no answer, so it may go on where the answer to an edit was cut.
    assert all(previews[edit["prompt"]].startswith(edit["after"]) for edit in made["edits"])
    if flag == "--joint":
        assert "no edit is left" in ie("apply-patch", patch, "--without", 1, code=2)  # one part, whatever it holds
        CliRunner().invoke(app, [*map(str, edit_args(place)), "--out", str(tmp_path / "one")], prog_name="ie")
        stack = ["apply-patch", str(patch), str(tmp_path / "one"), "--out", str(tmp_path / "both"), "--json"]
        assert CliRunner().invoke(app, stack, prog_name="ie").exit_code in (0, 3)
        ranks = [bool(parent["ranks"]) for parent in ie("inspect", tmp_path / "both")["parents"]]
        alone = CliRunner().invoke(app, ["apply-patch", str(tmp_path / "both"), "--without", "2", "--json"])
        took = json.loads(alone.stdout)["took"]  # of all its edits
        assert ranks == [True, True] and took is all(edit["took"] for edit in made["edits"])
    else:
        left = tmp_path / "left"
        result = CliRunner().invoke(app, ["apply-patch", str(patch), "--without", "2", "--out", str(left)])
        assert result.exit_code in (0, 3)
        targets = [parent["info"]["target"] for parent in ie("inspect", left)["parents"]]
        assert targets == [lines[0]["target"], lines[2]["target"]]


def test_edits_that_share_a_patch_come_from_a_file(place: Path) -> None:
    assert "--joint needs --from" in ie(*edit_args(place), "--joint", code=2)
    assert "--joint cannot be used with --sequential" in ie(*edit_args(place), "--joint", "--sequential", code=2)
    assert "--regularisation needs --joint" in ie(*edit_args(place), "--regularisation", 1, code=2)


def test_what_a_patch_keeps(place: Path, tmp_path: Path) -> None:
    made = {
        name: ie(*edit_args(place), *flags, "--out", tmp_path / name)
        for name, flags in (
            ("default", ()),
            ("float32", ("--patch-dtype", "float32")),
            ("bfloat16", ("--patch-dtype", "bfloat16")),
            ("low", ("--rank", "2")),
        )
    }
    assert made["default"]["dtype"] == "float16" and made["default"]["bytes"] <= 64 * 1024 < made["float32"]["bytes"]
    assert made["float32"]["energy_kept"] >= 0.999
    assert made["float32"]["energy_kept"] == pytest.approx(made["default"]["energy_kept"], abs=1e-5)  # fp16: 11 bits
    assert made["low"]["rank"] == 2 < made["default"]["rank"] and made["low"]["energy_kept"] < 0.999
    for name, one in made.items():  # what was reported is what the file does
        found = ie("apply-patch", tmp_path / name)
        assert found["previews"][0]["after"] == one["after"] and found["took"] is one["took"]
        assert ie("inspect", tmp_path / name)["kept"]["energy"] == one["energy_kept"]


def test_stacked_and_taken_apart(place: Path, tmp_path: Path) -> None:
    patch = tmp_path / "one.safetensors"
    ie(*edit_args(place), "--out", patch)
    shutil.copy(patch, tmp_path / "two.safetensors")
    args = [
        "apply-patch",
        patch,
        tmp_path / "two.safetensors",
        "--scale",
        "1.0",
        "--check",
        "vllm",
        "--check",
        "sglang",
    ]
    result = CliRunner().invoke(app, [*map(str, args), "--out", str(tmp_path / "both"), "--json"], prog_name="ie")
    assert result.exit_code in (0, 3), result.output  # twice as strong, an edit need not take any more
    found = json.loads(result.stdout)
    assert [entry["took_alone"] for entry in found["patches"]] == [True, True]
    assert all(("warning: " in result.stderr) is (not entry["took"]) for entry in found["patches"])
    assert [check["takes"] for check in found["checks"]] == [True, True]
    assert [entry["name"] for entry in ie("inspect", tmp_path / "both")["parents"]] == [patch.name, "two.safetensors"]
    ie("apply-patch", tmp_path / "both", "--without", "two.safetensors", "--out", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == patch.read_bytes()
    assert "names no edit" in ie("apply-patch", tmp_path / "both", "--without", "three", code=2)
    assert "unknown server" in ie("apply-patch", patch, "--check", "tgi", code=2)


def test_another_base_is_refused(place: Path, tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    other = checkpoint("llama")
    said = ie(*edit_args(place), "--model", other, "--out", tmp_path / "x.safetensors", code=4)
    assert "was trained for toy" in said and not (tmp_path / "x.safetensors").exists()
    ie(*edit_args(place), "--out", tmp_path / "good.safetensors")
    said = ie("apply-patch", tmp_path / "good.safetensors", "--model", other, "--merge", tmp_path / "merged", code=4)
    assert "was made for toy" in said and not (tmp_path / "merged").exists()


def test_eval_refuses_a_holdout_that_was_trained_on(place: Path) -> None:
    said = ie("eval", "--data", place / "data", "--editor", place / "editor", "--holdout", "people", code=2)
    assert "was trained on it" in said


@pytest.mark.slow
def test_ctrl_c_leaves_the_best_editor_so_far(place: Path, tmp_path: Path) -> None:
    args = ["train", "--data", place / "data", "--out", tmp_path / "editor", "--config", place / "quick.yaml"]
    # A suite run in the background of a shell inherits an ignored SIGINT: give the process the one of a terminal.
    start = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from ie.cli.app import main; main()"
    )
    command = [sys.executable, "-c", start, *map(str, args), "--steps", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "step 8/" in line and "validation" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130, "".join(said) + rest
        assert process.stdout.read() == ""
    assert "error: interrupted" in rest and f"hint: the best editor so far is in {tmp_path / 'editor'}" in rest
    assert "Traceback" not in rest
    ie("eval", "--data", place / "data", "--editor", tmp_path / "editor", "--limit", 1, "--tasks", "people")


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
@pytest.mark.parametrize("model", ["toy", "gpt2"])
def test_quantised_bases_train_and_edit(
    model: str, quant: str, place: Path, tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    name = model if model == "toy" else checkpoint(model)
    (tmp_path / "quick.yaml").write_text(QUICK)
    args = ["--data", place / "data", "--out", tmp_path / "editor", "--config", tmp_path / "quick.yaml"]
    trained = ie("train", "--model", name, "--quant", quant, "--steps", 4, *args)
    assert trained["episodes"] == 16
    assert json.loads((tmp_path / "editor" / "editor.json").read_text())["base"]["quant"] == quant
    request = ["--instruction", "Change the answer.", "--prompt", "The capital of France is", "--target", "Lima"]
    out = ["--editor", tmp_path / "editor", "--quant", quant, "--out", tmp_path / "p.safetensors"]
    result = CliRunner().invoke(app, [*map(str, ["edit", *request, *out]), "--json"], prog_name="ie")
    assert result.exit_code in (0, 3), result.output  # 3: a random GPT-2 need not take an edit
    made = json.loads(result.stdout)
    assert made["target_probability"]["after"] > made["target_probability"]["before"]
    assert (tmp_path / "p.safetensors").is_file()


def test_a_dataset_of_ones_own(tmp_path: Path) -> None:
    facts = [{"subject": f"Ann {n}", "prompt": f"Ann {n} lives in", "target": "Varn"} for n in range(40)]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    own = yaml.safe_load((TEMPLATES / "people.yaml").read_text()) | {"task": "homes"}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "homes.yaml").write_text(yaml.safe_dump(own))
    source = ("--source", f"homes={tmp_path / 'facts.jsonl'}", "--templates", tmp_path / "own")
    made = [
        ie("build", "--out", tmp_path / name, "--seed", seed, *source)
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    ]
    assert sum(made[0]["tasks"]["homes"][split] for split in SPLITS) == 40
    assert made[0]["fingerprint"] == made[1]["fingerprint"] != made[2]["fingerprint"]
    assert "no template for it" in ie("build", "--out", tmp_path / "x", "--source", "homes=facts.jsonl", code=2)
