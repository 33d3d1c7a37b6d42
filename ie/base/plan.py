"""How a base model will be loaded, and from where; no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ie.errors import InputError, ModelError
from ie.source import local_folder

__all__ = ["Plan", "is_here", "meta_model", "plan_load", "resolve_folder"]

# Of a hub's repository; some hold the same weights in other formats too.
_NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt"]
_NOT_NEEDED = ["*/*", "consolidated*", "adapter_*"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """How a base model will be loaded, and why.

    Attributes:
        device: `cpu`, `cuda`, ...
        dtype: what is computed in.
        quant: `none`, `8bit` or `4bit`.
        reason: one sentence for the user.
    """

    device: torch.device
    dtype: torch.dtype
    quant: str
    reason: str


def plan_load(quant: str = "auto", dtype: str = "auto", device: str = "auto") -> Plan:
    """Choose device, dtype and quantisation; the device may be another machine's.

    Raises:
        InputError: if a value is unknown.
    """
    for flag, value, known in (
        ("quant", quant, ("auto", "8bit", "4bit", "none")),
        ("dtype", dtype, ("auto", *DTYPES)),
    ):
        if value not in known:
            raise InputError(f"unknown {flag} {value!r}, expected one of: {', '.join(known)}")
    where = _device(device)
    on_gpu = where.type == "cuda"
    kind = ("8bit" if on_gpu else "none") if quant == "auto" else quant
    compute = (torch.bfloat16 if on_gpu else torch.float32) if dtype == "auto" else DTYPES[dtype]
    reason = "a GPU is there: the base fits in a quarter of the memory" if on_gpu else "no GPU: fp32 is exact"
    return Plan(where, compute, kind, reason)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}, expected auto, cpu, cuda or cuda:N") from error


def is_here(device: torch.device) -> bool:
    """Whether this machine has a device; a plan may be for another's."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        return False
    return True


def resolve_folder(name: str) -> Path:
    """The folder that holds a base model: the bundled one, the one named, or the hub's copy on this machine.

    Raises:
        ModelError: if there is none.
    """
    folder = local_folder(name)
    if folder is not None:
        return folder
    try:
        return Path(snapshot_download(name, allow_patterns=_NEEDED, ignore_patterns=_NOT_NEEDED))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"the base model {name!r} could not be fetched from the hub: {reason}",
            hint="check the id and the network, or point --model at a folder",
        ) from error


def meta_model(name: str) -> PreTrainedModel:
    """A base model's modules and shapes from its configuration alone, on the meta device: no weight is loaded.

    Raises:
        ModelError: if the configuration cannot be read.
    """
    source = local_folder(name) or name
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{name} has no configuration of a causal LM that transformers can read: {reason}") from error
    return model
