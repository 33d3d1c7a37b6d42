"""Writing an update as a PEFT LoRA adapter: an edit is exactly one, with alpha equal to the rank.

One uniform rank, zero-padded to a rank that servers accept; module paths in full; no pattern, no saved module.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ie.base.model import Base
from ie.base.targets import is_transposed
from ie.base.update import Update
from ie.errors import PatchError
from ie.files import new_folder

__all__ = ["RANKS", "export_peft"]

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def export_peft(base: Base, update: Update, out: Path) -> int:
    """Write an adapter folder and return its rank.

    Args:
        base: the base model.
        update: a single edit (batch of one).
        out: the folder to write.

    Raises:
        PatchError: if the update's rank is larger than any that servers accept.
    """
    needed = max(a.shape[1] for a, _ in update.values())
    rank = next((rank for rank in RANKS if rank >= needed), None)
    if rank is None:
        raise PatchError(f"the update has rank {needed}, adapters go up to {RANKS[-1]}", hint="apply fewer patches")
    tensors = {}
    for name, (a, b) in update.items():
        padding = (0, 0, 0, rank - a.shape[1])
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.nn.functional.pad(a[0].float().cpu(), padding).contiguous()
        tensors[f"{key}.lora_B.weight"] = torch.nn.functional.pad(b[0].float().cpu(), padding).T.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.id,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(is_transposed(base.model.get_submodule(name)) for name in update),
        "target_modules": sorted(update),
        "inference_mode": True,
    }
    with new_folder(out) as fresh:
        save_file(tensors, fresh / "adapter_model.safetensors", metadata={"format": "pt"})
        (fresh / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return rank
