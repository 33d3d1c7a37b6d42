"""Patches of real edits: `python -m benchmarks.patches --editor DIR --data DIR [--model M] [--n 20] [--rank 4]`.

Sizes of the patches of `--n-sizes` test records; `--n` random ones stacked, alone and together, who disturbs whom, and
whether taking one out leaves the others' logits as they were, bit for bit; and the peak memory of merging a sharded
checkpoint of random weights, against its largest shard.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ie.base.load import load_base
from ie.base.model import Base
from ie.data.dataset import Dataset
from ie.editor.editing import RequestSettings, make_patches
from ie.editor.files import load_editor, load_info
from ie.editor.methods import editor_method
from ie.editor.request import EditRequest
from ie.patch.apply import apply_patch
from ie.patch.live import applied
from ie.patch.patch import Patch
from ie.versions import versions

_BATCH = 32
_MERGE = """
import sys
from pathlib import Path
import torch
from ie.base.plan import meta_model
from ie.base.targets import find_targets
from ie.patch.merge import merge_checkpoint
source, out = Path(sys.argv[1]), Path(sys.argv[2])
update = {t.name: (torch.ones(1, 4, t.d_in), torch.ones(1, 4, t.d_out)) for t in find_targets(meta_model(str(source)))}
def peak():  # of this process alone: getrusage has that of the process which started it, too
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
merge_checkpoint(source, update, out)
print(before, peak())
"""


def draw(data: Path, n: int, seed: int) -> list[RequestSettings]:
    """Random test records as edit requests, each with a held-out instruction."""
    records = Dataset.load(data).records("test")
    drawn = random.Random(seed).sample(records, min(n, len(records)))
    return [
        RequestSettings(instruction=record.instruction.heldout[0], prompt=record.prompt, target=record.target)
        for record in drawn
    ]


def edits(base: Base, editor_folder: Path, requests: list[RequestSettings], rank: int | None = None) -> list[Patch]:
    """The patches of some requests, as `ie edit` makes them."""
    editor, info = load_editor(editor_folder, base)
    method, made = editor_method(editor), []
    for start in range(0, len(requests), _BATCH):
        chunk = requests[start : start + _BATCH]
        update = method(base, [EditRequest(one.prompt, one.target, one.instruction) for one in chunk])
        made += make_patches(base, update, chunk, info, rank)
    return made


def sizes(patches: list[Patch], folder: Path) -> dict[str, Any]:
    """Bytes and ranks."""
    n_bytes = sorted(patch.save(folder / "patch") for patch in patches)
    took = [patch for patch in patches if patch.info.took]
    return {
        "patches": len(patches),
        "took": len(took),
        "median_bytes": n_bytes[len(n_bytes) // 2],
        "largest_bytes": n_bytes[-1],
        **{f"share_of_at_most_{kib}_kib": sum(n <= kib * 1024 for n in n_bytes) / len(n_bytes) for kib in (64, 256)},
        "largest_rank": max(patch.rank for patch in patches),
        "least_energy_kept": min(patch.info.kept.energy for patch in patches if patch.info.kept),
    }


def stacking(base: Base, patches: list[Patch], folder: Path) -> dict[str, Any]:
    """All patches as one, then without each in turn."""
    paths = [folder / f"{i:02d}.safetensors" for i in range(1, len(patches) + 1)]
    for patch, path in zip(patches, paths, strict=True):
        patch.save(path)
    dtype = str(base.model.dtype).removeprefix("torch.")
    found = apply_patch(paths, model=base.id, out=folder / "stack", dtype=dtype)
    batch = base.collate([base.encode(patch.info.prompt or "") for patch in patches])

    def logits(*on: Patch) -> torch.Tensor:
        with applied(base, *on), torch.no_grad():
            out: torch.Tensor = base.model(
                input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False
            ).logits
        return out

    loaded, exact, plain = [Patch.load(path) for path in paths], 0, logits()
    for gone in range(len(paths)):
        options: dict[str, Any] = {"model": base.id, "dtype": dtype, "out": folder / "rest"}
        apply_patch([folder / "stack"], leave_out=[str(gone + 1)], **options)
        others = [patch for i, patch in enumerate(loaded) if i != gone]
        exact += torch.equal(logits(Patch.load(folder / "rest")), logits(*others))
    return {
        "edits": len(paths),
        "took_alone": sum(bool(entry["took_alone"]) for entry in found["patches"]),
        "took_together": sum(bool(entry["took"]) for entry in found["patches"]),
        "disturbed": {entry["patch"]: entry["by"] or f"all (most {entry['most_by']})" for entry in found["disturbed"]},
        "exact_without_one": f"{exact} of {len(paths)}",
        "base_unchanged": torch.equal(logits(), plain),
        "stack_bytes": found["out"]["bytes"],
    }


def merging(folder: Path) -> dict[str, Any]:
    """Peak memory of merging a Llama of 0.4 G parameters in bf16, in shards."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.to_empty(device="cpu").save_pretrained(folder / "large", max_shard_size="300MB")
    shards = [path.stat().st_size for path in (folder / "large").glob("*.safetensors")]
    command = [sys.executable, "-c", _MERGE, str(folder / "large"), str(folder / "merged")]
    before, after = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    return {
        "shards": len(shards),
        "largest_shard_bytes": max(shards),
        "peak_before_bytes": before,
        "peak_bytes": after,
        "growth_over_largest_shard": (after - before) / max(shards),
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--editor", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="the editor's base unless given")
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--n-sizes", type=int, default=200)
    parser.add_argument("--rank", type=int, default=4, help="of a second round of sizes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    base = load_base(args.model or load_info(args.editor).base.id)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        requests = draw(args.data, args.n_sizes, args.seed)
        for rank in (None, args.rank):
            result[f"sizes, rank {rank or 'by energy'}"] = sizes(edits(base, args.editor, requests, rank), folder)
        result["stacking"] = stacking(base, edits(base, args.editor, draw(args.data, args.n, args.seed)), folder)
        result["merging"] = merging(folder)
    sys.stdout.write(json.dumps({**result, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
