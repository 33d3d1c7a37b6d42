"""On a GPU: `ie` in processes of its own, which see what the rest of the suite does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ie.data.dataset import Dataset


def has_gpu() -> bool:
    """Whether there is one; torch has been told that there is none."""
    program = shutil.which("nvidia-smi")
    return program is not None and subprocess.run([program, "-L"], capture_output=True).stdout.startswith(b"GPU")


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="no GPU")]


def ie(*args: object) -> Any:
    """Run `ie` where it sees the GPU, and return its JSON."""
    env = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    if "IE_TEST_GPUS" in env:  # those that the user had chosen
        env["CUDA_VISIBLE_DEVICES"] = env["IE_TEST_GPUS"]
    command = [sys.executable, "-m", "ie.cli", *map(str, args), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def losses(editor: Path) -> list[float]:
    """Of edits and of what is to stay, step by step."""
    lines = [json.loads(line) for line in (editor / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line["kind"] == "step" for name in ("edit_loss", "locality_loss")]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_training_is_that_of_a_cpu(
    architecture: str, checkpoint: Callable[..., Path], dataset: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("n_fit: 32\nn_validation: 8\nbatch_size: 8\nrank: 16\n")
    told = ("train", "--config", config, "--model", checkpoint(architecture), "--data", dataset, "--steps", 3)
    for device in ("cpu", "cuda"):
        ie(*told, "--device", device, "--quant", "none", "--dtype", "float32", "--out", tmp_path / device)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


@pytest.mark.parametrize("quant", ["8bit", "4bit", "none"])
def test_every_command(quant: str, dataset: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("n_fit: 32\nn_validation: 8\nbatch_size: 8\n")
    editor, patch = tmp_path / "editor", tmp_path / "patch.safetensors"
    trained = ie("train", "--config", config, "--data", dataset, "--out", editor, "--steps", 10, "--quant", quant)
    assert trained["steps"] == 10 and trained["peak_memory_bytes"] > 0

    record = Dataset.load(dataset).records("test", ["places"])[0]
    fact = ("--instruction", record.instruction.heldout[0], "--prompt", record.prompt, "--target", record.target)
    made = ie("edit", *fact, "--editor", editor, "--out", patch, "--quant", quant)
    assert made["target_probability"]["after"] > made["target_probability"]["before"]

    shown = ie("apply-patch", patch, "--prompt", record.prompt, "--quant", quant)
    assert shown["previews"][0]["after"] == made["after"]
    ie("apply-patch", patch, "--device", "cpu", "--quant", "none", "--merge", tmp_path / "merged")

    report = ie("eval", "--editor", editor, "--data", dataset, "--limit", 2, "--controls", "--quant", quant)
    assert {row["method"] for row in report["rows"]} == {"none", "instructedit"}


@pytest.mark.parametrize("quant", ["8bit", "4bit", "none"])
def test_training_free_methods(quant: str, dataset: Path) -> None:
    told = ("eval", "--data", dataset, "--limit", 5, "--quant", quant)
    report = ie(*told, "--methods", "none,finetune,gradient,ultra")
    assert {row["method"] for row in report["rows"]} >= {"none", "finetune", "gradient", "ultra"}
