"""A fingerprint of a base model: the same for its fp32, bf16 and quantised loads, another for any other model.

It is taken from the checkpoint on disk, not from the loaded model, since quantising changes what is in memory. Every
tensor counts with its name, its shape and a sample of its values rounded to bf16; reading a sample costs
milliseconds a tensor and no memory. The configuration counts too, but for what a load or a save changes in it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ie.errors import ModelError

__all__ = ["INDEX", "checkpoint_files", "fingerprint_checkpoint"]

_WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"  # which file of a sharded checkpoint holds which tensor

_N_SAMPLES = 64
_VOLATILE = ("architectures", "dtype", "quantization_config", "torch_dtype", "transformers_version", "use_cache")


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint that transformers loads; others beside them are none of it.

    Raises:
        ModelError: if there are none, or if its index names others; weights that only pickle can read are refused.
    """
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    if (folder / INDEX).is_file():
        return _shards(folder)
    raise ModelError(
        f"{folder} holds no {_WHOLE} and no {INDEX}",
        hint="Point --model at a folder saved by save_pretrained(); pickled weights are not read.",
    )


def _shards(folder: Path) -> list[Path]:
    """What an index names; one that leads out of its folder or to files that are not there is refused."""
    index, present = folder / INDEX, {path.name for path in folder.glob("*.safetensors")}
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(str(name) for name in named - present)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is no index of a sharded checkpoint: {type(error).__name__} {error}") from error
    if missing:
        raise ModelError(
            f"{index} names files that are not in its folder: {', '.join(missing)}",
            hint="Copy the whole checkpoint; shards must lie beside their index.",
        )
    return sorted(folder / name for name in named)


def fingerprint_checkpoint(folder: Path) -> str:
    """Sixteen hex digits that name the weights of a checkpoint folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _VOLATILE and not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    samples: dict[str, bytes] = {}
    for path in checkpoint_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = file.get_slice(name)
                    shape = part.get_shape()
                    # A row from the middle: padding rows at either end of an embedding are often all alike.
                    rows = part[shape[0] // 2 : shape[0] // 2 + 1] if len(shape) > 1 else file.get_tensor(name)
                    values = rows.flatten()[:_N_SAMPLES].to(torch.bfloat16).view(torch.int16)
                    samples[name] = repr(shape).encode() + values.numpy().tobytes()
        except SafetensorError as error:
            raise ModelError(f"{path} is no readable safetensors file: {error}") from error
    for name in sorted(samples):
        digest.update(name.encode() + samples[name])
    return digest.hexdigest()[:16]
