"""Reading a PEFT LoRA adapter's folder without torch: its configuration, and which tensors are factors of what.

    adapter_config.json           what it is: type, rank, scaling
    adapter_model.safetensors     `base_model.model.<module path>.lora_A.weight` (r, d_in), `.lora_B.weight` (d_out, r)

PEFT computes y + scaling · B A x, scaling = alpha / r (alpha / √r with `use_rslora`): a low-rank update, whatever tool
trained it. Anything in an adapter that is more than that is refused, since a patch could not say it.
"""

from __future__ import annotations

import json
import math
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ie.errors import PatchError
from ie.header import FACTOR_DTYPES, Tensors, is_module_path, read_header

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "Lora", "is_adapter", "read_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1_000_000
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
_MORE_THAN_LORA = {
    "use_dora": "DoRA also changes magnitudes",
    "modules_to_save": "it replaces whole modules",
    "lora_bias": "it changes biases",
    "layer_replication": "it repeats layers",
    "trainable_token_indices": "it changes token embeddings",
    "target_parameters": "it changes parameters that are no linear modules",
    "alora_invocation_tokens": "it acts from some tokens on only",
}
# Of PEFT's ways to begin those that leave the base as it is; others (PiSSA, OLoRA, ...) change it when they are loaded.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
_PEFT_DEFAULT = 8  # of rank and alpha
_MAX_ALPHA = 1e9


@dataclass(frozen=True)
class Lora:
    """One module's factors.

    Attributes:
        a: name of the tensor lora_A (rank, d_in).
        b: name of the tensor lora_B (d_out, rank).
        rank: their rank.
        d_in: number of input features.
        d_out: number of output features.
        scaling: what their product is multiplied with.
        dtype: as safetensors writes it.
    """

    a: str
    b: str
    rank: int
    d_in: int
    d_out: int
    scaling: float
    dtype: str


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder says.

    Attributes:
        base: the base model that it names, or "".
        modules: its factors by module path.
    """

    base: str
    modules: dict[str, Lora]


def is_adapter(path: Path) -> bool:
    """Whether a path is meant to be an adapter's folder."""
    return path.is_dir() and any((path / name).exists() for name in (CONFIG, WEIGHTS, "adapter_model.bin"))


def read_adapter(folder: Path) -> Adapter:
    """Read and check an adapter's configuration and header.

    Raises:
        PatchError: if it is no LoRA adapter, or more than one; all faults of its tensors are named.
    """
    config = _config(folder)
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        why = " (adapter_model.bin is a pickle, which can run code)" if pickled else ""
        raise PatchError(f"{folder} has no {WEIGHTS}{why}", hint="save the adapter as safetensors")
    _, tensors = read_header(folder / WEIGHTS)
    pairs = _pairs(folder, tensors)
    base = config.get("base_model_name_or_path")
    modules = {}
    for module, (a, b) in pairs.items():
        (dtype, (rank, d_in)), (_, (d_out, _)) = tensors[a], tensors[b]
        modules[module] = Lora(a, b, rank, d_in, d_out, _scaling(folder, config, module, rank), dtype)
    return Adapter(base if isinstance(base, str) else "", modules)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise OSError("no regular file")  # a pipe would be waited for
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise PatchError(f"{file} has more than {_MAX_CONFIG_BYTES} bytes: no adapter's configuration")
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PatchError(f"cannot read {file}: {error.strerror or error}", hint="expected a PEFT adapter") from error
    except (ValueError, RecursionError) as error:
        raise PatchError(f"{file} is not valid JSON ({error})", hint="expected a PEFT adapter") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise PatchError(f"{file} describes no LoRA adapter: peft_type is {kind!r}, expected 'LORA'")
    more = [f"{key} ({why})" for key, why in _MORE_THAN_LORA.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        more.append("bias (it changes biases)")
    if config.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
        more.append("init_lora_weights (it changes the base too; PEFT can save it converted)")
    if more:
        raise PatchError(
            f"{file}: the adapter is more than a low-rank update: {', '.join(more)}",
            hint="merge it with PEFT, then use the merged model as a base",
        )
    return config


def _pairs(folder: Path, tensors: Tensors) -> dict[str, tuple[str, str]]:
    """By module the names of its two tensors."""
    found: dict[str, dict[str, str]] = {}
    faults = [] if tensors else ["it holds no tensors"]
    for name, (dtype, shape) in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or not is_module_path(match["module"]):
            faults.append(f"{name!r} is no factor of a linear module")
        elif dtype not in FACTOR_DTYPES:
            faults.append(f"{name!r} is {dtype}, expected one of {', '.join(FACTOR_DTYPES)}")
        elif len(shape) != 2 or not all(shape):
            faults.append(f"{name!r} has the shape {list(shape)}, expected two sizes, none 0")
        elif match["factor"] in found.setdefault(match["module"], {}):
            faults.append(f"{match['module']} has lora_{match['factor']} twice")
        else:
            found[match["module"]][match["factor"]] = name
    for module, names in found.items():
        if len(names) < 2:
            faults.append(f"{module} has no lora_{'B' if 'A' in names else 'A'}")
        elif tensors[names["A"]][1][0] != tensors[names["B"]][1][1]:
            ranks = f"{tensors[names['A']][1][0]} and {tensors[names['B']][1][1]}"
            faults.append(f"the factors of {module} have the ranks {ranks}")
    if faults:
        raise PatchError(f"{folder / WEIGHTS} holds no LoRA adapter: {'; '.join(faults)}")
    return {module: (names["A"], names["B"]) for module, names in found.items()}


def _scaling(folder: Path, config: dict[str, Any], module: str, rank: int) -> float:
    """PEFT's scaling of one module."""
    alpha = _of_pattern(folder, config, "alpha_pattern", module, config.get("lora_alpha", _PEFT_DEFAULT))
    r = _of_pattern(folder, config, "rank_pattern", module, config.get("r", _PEFT_DEFAULT))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _MAX_ALPHA:
        raise PatchError(f"{folder / CONFIG}: lora_alpha of {module} is {alpha!r:.40}, expected a number below 1e9")
    if r != rank:
        raise PatchError(f"{folder / CONFIG}: r of {module} is {r!r}, its tensors have the rank {rank}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _of_pattern(folder: Path, config: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """A module's own value: patterns are ends of module paths, or behind `^` whole ones. Regular expressions of a
    stranger are not run.
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict) or not all(is_module_path(name.removeprefix("^")) for name in patterns):
        raise PatchError(f"{folder / CONFIG}: {key} must map ends of module paths to numbers")
    for name, value in patterns.items():
        if module == name[1:] if name.startswith("^") else f".{module}".endswith(f".{name}"):
            return value
    return default
