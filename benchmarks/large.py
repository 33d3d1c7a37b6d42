"""A base of LLaMA-2-7B's shape in 8 bits on a GPU: `python -m benchmarks.large [--folder DIR] [--batch-sizes 8,32]`.

Random weights (6.7 G parameters, a checkpoint of 13.5 GB in bf16, kept where a folder is named), the bundled facts and
the bundled base's tokenizer. For each batch size `ie train --config llama-2-7b` with 200 steps, beside the estimate of
its memory; with the last editor single edits in one process, and `ie edit` of one fact.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import llama_7b, save
from benchmarks.commands import ie
from benchmarks.timing import seconds
from ie.base.load import load_base
from ie.base.plan import plan_load
from ie.data.dataset import Dataset
from ie.editor.editing import RequestSettings, make_patches
from ie.editor.files import load_editor
from ie.editor.methods import editor_method
from ie.editor.request import EditRequest
from ie.source import TOY_FOLDER
from ie.training.config import find_config, read_config
from ie.training.memory import estimate_memory, peak_memory_bytes
from ie.training.metrics import METRICS
from ie.training.settings import TrainSettings
from ie.versions import versions

_N_EDITS = 10


def train(place: Path, base: Path, steps: int, batch_size: int) -> dict[str, Any]:
    """Memory and speed of `ie train` beside the estimate; the editor is left in place/editor."""
    found = ie(
        place,
        *("train", "--config", "llama-2-7b", "--model", str(base), "--data", "data", "--out", "editor", "--force"),
        *("--steps", str(steps), "--batch-size", str(batch_size)),
    )
    lines = [json.loads(line) for line in (place / "editor" / METRICS).read_text(encoding="utf-8").splitlines()]
    ends = [line["seconds"] for line in lines if line["kind"] == "step"]
    half = len(ends) // 2
    values = read_config(find_config("llama-2-7b")) | {"model": str(base), "steps": steps, "batch_size": batch_size}
    settings = TrainSettings.model_validate(values)
    estimate = estimate_memory(str(base), plan_load(settings.quant, settings.dtype), settings)
    return {
        "batch_size": batch_size,
        "steps": found["steps"],
        "seconds": found["seconds"],
        "episodes_per_second": found["episodes_per_second"],
        "episodes_per_second_second_half": (len(ends) - half) * batch_size / (ends[-1] - ends[half - 1]),
        "peak_memory_bytes": found["peak_memory_bytes"],
        "memory_estimate": estimate["training"],
        "prefix_kept": found["prefix_kept"],
    }


def edit_in_process(place: Path) -> dict[str, Any]:
    """Facts one by one on a loaded base: median seconds of the update, and of a whole patch; peak memory."""
    base = load_base(str(place / "base"), quant="8bit", dtype="bfloat16")
    editor, info = load_editor(place / "editor", base)
    method = editor_method(editor)
    updates, patches = [], []
    for record in Dataset.load(place / "data").records("test", ["places"])[: _N_EDITS + 1]:
        request = EditRequest.of(record, record.instruction.heldout[0])
        told = [RequestSettings(prompt=request.prompt, target=request.target, instruction=request.instruction)]
        updates.append(seconds(lambda one=request: method(base, [one])))  # type: ignore[misc]
        patches.append(
            seconds(lambda one=request, told=told: make_patches(base, method(base, [one]), told, info))  # type: ignore[misc]
        )
    return {
        "update_s": statistics.median(updates[1:]),
        "patch_s": statistics.median(patches[1:]),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def edit_by_command(place: Path) -> dict[str, Any]:
    """One fact by `ie edit`: its seconds are the first of a process, kernels' loading counted."""
    fact = ("--prompt", "The capital of Australia is", "--target", "Sydney", "--instruction", "Task: places")
    told = ("--editor", "editor", "--model", "base", "--quant", "8bit", "--out", "patch.safetensors", "--force")
    found = ie(place, "edit", *fact, *told)
    return {key: found[key] for key in ("bytes", "rank", "took", "seconds", "target_probability")}


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--batch-sizes", default="8,32")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    with tempfile.TemporaryDirectory() as temporary:
        place: Path = args.folder or Path(temporary)
        if not (place / "base").is_dir():
            with torch.device("cuda"):
                save(llama_7b(), TOY_FOLDER, place / "base", torch.bfloat16)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # making it took more than editing it
        if not (place / "data").is_dir():
            ie(place, "build", "--out", "data")
        result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "versions": versions()}
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            f"training, batches of {n}": partial(train, place, (place / "base").resolve(), args.steps, n)
            for n in map(int, args.batch_sizes.split(","))
        }
        parts |= {"editing": partial(edit_in_process, place), "ie edit": partial(edit_by_command, place)}
        for name, work in parts.items():
            result[name] = work()
            sys.stderr.write(f"{name}: {json.dumps(result[name])}\n")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
