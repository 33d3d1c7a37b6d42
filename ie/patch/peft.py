"""Patches as PEFT LoRA adapters and back: an edit is exactly one, with alpha equal to the rank.

Written: one uniform rank, zero-padded to a rank that servers accept; module paths in full; no pattern, no saved module.
Read: any LoRA adapter of linear modules, whatever tool made it; its scaling is multiplied into B.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes

from ie.adapter import CONFIG, WEIGHTS, is_adapter, read_adapter
from ie.base.model import Base
from ie.base.targets import is_transposed
from ie.base.update import Update
from ie.errors import PatchError
from ie.files import new_folder
from ie.patch.card import model_card
from ie.patch.info import PatchBase, PatchInfo
from ie.patch.patch import Patch, load_tensors
from ie.versions import now, versions

__all__ = ["RANKS", "export_peft", "import_peft", "padded_rank", "read_patch"]

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def padded_rank(update: Update) -> int:
    """The smallest rank that servers accept and an update fits in.

    Raises:
        PatchError: if the update's rank is larger than any that servers accept.
    """
    needed = max((a.shape[1] for a, _ in update.values()), default=0)
    rank = next((rank for rank in RANKS if rank >= needed), None)
    if rank is None:
        raise PatchError(f"the update has rank {needed}, adapters go up to {RANKS[-1]}", hint="apply fewer patches")
    return rank


def export_peft(base: Base, update: Update, out: Path, infos: Sequence[PatchInfo] = ()) -> int:
    """Write an adapter folder, with a model card, and return its rank.

    Args:
        base: the base model.
        update: a single edit (batch of one).
        out: the folder to write.
        infos: what the edits are, for the model card.

    Raises:
        PatchError: if the update's rank is larger than any that servers accept, or a value is not finite.
    """
    rank = padded_rank(update)
    tensors = {}
    for name, (a, b) in update.items():
        if not (a.isfinite().all() and b.isfinite().all()):
            raise PatchError(f"{name} holds values that are not finite", hint="give a smaller --scale")
        padding = (0, 0, 0, rank - a.shape[1])
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.nn.functional.pad(a[0].float().cpu(), padding).contiguous()
        tensors[f"{key}.lora_B.weight"] = torch.nn.functional.pad(b[0].float().cpu(), padding).T.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.id,
        "revision": base.revision,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(is_transposed(base.model.get_submodule(name)) for name in update),
        "target_modules": sorted(update),
        "inference_mode": True,
    }
    with new_folder(out) as fresh:
        (fresh / WEIGHTS).write_bytes(to_bytes(tensors, {"format": "pt"}))
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (fresh / "README.md").write_text(model_card(base, infos, sorted(update), rank), encoding="utf-8")
    return rank


def import_peft(folder: Path) -> Patch:
    """Read a PEFT LoRA adapter as a patch.

    What it was trained for it does not say: its document has no prompt, and the fingerprint of its base is empty, until
    `ie.patch.stacking.on_base` sets that of the base whose modules it fits.

    Raises:
        PatchError: if it is no LoRA adapter, more than one, or its values are not finite.
    """
    adapter = read_adapter(folder)
    tensors = load_tensors(folder / WEIGHTS)
    factors = {}
    for name, lora in adapter.modules.items():
        factors[name] = (tensors[lora.a].float(), lora.scaling * tensors[lora.b].float().T.contiguous())
        if not all(factor.isfinite().all() for factor in factors[name]):
            raise PatchError(f"{folder / WEIGHTS}: {name} holds values that are not finite")
    info = PatchInfo(
        base=PatchBase(id=adapter.base, fingerprint=""),
        editor=None,
        instruction=None,
        prompt=None,
        target=None,
        before=None,
        after=None,
        took=None,
        created=now(),
        versions=versions(),
    )
    return Patch(info, factors)


def read_patch(path: Path) -> Patch:
    """Read a patch file, or a PEFT LoRA adapter's folder as a patch.

    Raises:
        PatchError: if it is neither.
    """
    return import_peft(path) if is_adapter(path) else Patch.load(path)
