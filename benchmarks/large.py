"""A base of LLaMA-2-7B's shape in 8 bits on a GPU: `python -m benchmarks.large [--folder DIR] [--batch-sizes 8,32]`.

Random weights (6.7 G parameters, a checkpoint of 13.5 GB in bf16, kept where a folder is named), the bundled facts and
the bundled base's tokenizer. Each batch size is what a user runs: `ie train --dry-run`, `ie train --config llama-2-7b`
with 200 steps, `ie edit` of one fact, processes of their own. Single edits are then timed in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import llama_7b, save
from benchmarks.commands import ie
from benchmarks.timing import seconds
from ie.base.load import load_base
from ie.base.plan import TOY_FOLDER
from ie.data.dataset import Dataset
from ie.editor.editing import RequestSettings, make_patches
from ie.editor.files import load_editor
from ie.editor.methods import editor_method
from ie.editor.request import EditRequest
from ie.training.metrics import METRICS
from ie.versions import versions

_N_EDITS = 11


def train(place: Path, base: Path, steps: int, batch_size: int) -> dict[str, Any]:
    """Memory and speed of `ie train` beside what `--dry-run` says of them; the editor is left in place/editor."""
    told = (
        *("train", "--config", "llama-2-7b", "--model", str(base), "--data", "data", "--out", "editor", "--force"),
        *("--steps", str(steps), "--batch-size", str(batch_size)),
    )
    foretold, found = ie(place, *told, "--dry-run"), ie(place, *told)
    lines = [json.loads(line) for line in (place / "editor" / METRICS).read_text(encoding="utf-8").splitlines()]
    ends = [line["seconds"] for line in lines if line["kind"] == "step"]
    half = len(ends) // 2
    return {
        "batch_size": batch_size,
        "steps": found["steps"],
        "episodes_per_second": found["episodes_per_second"],
        "episodes_per_second_in_steps_of_the_second_half": (len(ends) - half) * batch_size / (ends[-1] - ends[half - 1]),
        "seconds": found["seconds"],
        "seconds_estimate": foretold["seconds_estimate"],
        "peak_memory_bytes": found["peak_memory_bytes"],
        "memory_estimate": foretold["memory_estimate"]["training"],
        "prefix_kept": found["prefix_kept"],
    }


def edit(place: Path) -> dict[str, Any]:
    """One fact by `ie edit`; then facts one by one in one process, seconds of the update and of a whole patch."""
    fact = ("--prompt", "The capital of Australia is", "--target", "Sydney", "--instruction", "Task: places")
    one = ie(place, "edit", *fact, "--editor", "editor", "--out", "patch.safetensors", "--force")
    base = load_base(str(place / "base"), quant="8bit", dtype="bfloat16")
    editor, info = load_editor(place / "editor", base)
    method = editor_method(editor)
    updates, patches = [], []
    for record in Dataset.load(place / "data").records("test", ["places"])[:_N_EDITS]:
        request = EditRequest.of(record, record.instruction.heldout[0])
        told = RequestSettings(prompt=record.prompt, target=record.target, instruction=request.instruction)
        updates.append(seconds(lambda request=request: method(base, [request])))  # type: ignore[misc]
        patches.append(
            seconds(
                lambda request=request, told=told: make_patches(base, method(base, [request]), [told], info)  # type: ignore[misc]
            )
        )
    kept = ("bytes", "rank", "took", "seconds", "target_probability")
    return {
        "ie edit": {key: one[key] for key in kept},
        "update_s": statistics.median(updates[1:]),
        "patch_s": statistics.median(patches[1:]),
    }


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--batch-sizes", default="8,32")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place: Path = args.folder or Path(temporary)
        if not (place / "base").is_dir():
            with torch.device("cuda"):
                save(llama_7b(), TOY_FOLDER, place / "base", torch.bfloat16)
            torch.cuda.empty_cache()
        if not (place / "data").is_dir():
            ie(place, "build", "--out", "data")
        found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "versions": versions(), "training": []}
        for batch_size in map(int, args.batch_sizes.split(",")):
            found["training"].append(train(place, place / "base", args.steps, batch_size))
            sys.stderr.write(json.dumps(found["training"][-1]) + "\n")
        found["editing"] = edit(place)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
