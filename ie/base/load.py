"""Loading a base model: the bundled toy, a folder, or a hub id; whole, in 8 bits or in 4."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ie.base.fingerprint import checkpoint_files, fingerprint_checkpoint
from ie.base.model import Base
from ie.base.suffix import Decoder
from ie.base.targets import N_EDITED_BLOCKS, find_blocks, find_targets
from ie.errors import InputError, ModelError

__all__ = ["TOY_FOLDER", "Plan", "load_base", "meta_model", "plan_load", "resolve_folder"]

Quant = Literal["auto", "8bit", "4bit", "none"]
TOY_FOLDER = Path(__file__).parent / "toy_base"

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
    """Choose device, dtype and quantisation.

    Raises:
        InputError: if a value is unknown.
    """
    for flag, value, known in (
        ("quant", quant, ("auto", "8bit", "4bit", "none")),
        ("dtype", dtype, ("auto", *DTYPES)),
    ):
        if value not in known:
            raise InputError(f"unknown {flag} {value!r}, expected one of: {', '.join(known)}")
    gpu = torch.cuda.is_available()
    where = torch.device(("cuda" if gpu else "cpu") if device == "auto" else device)
    on_gpu = where.type == "cuda"
    kind = ("8bit" if on_gpu else "none") if quant == "auto" else quant
    compute = (torch.bfloat16 if on_gpu else torch.float32) if dtype == "auto" else DTYPES[dtype]
    reason = "a GPU is there: the base fits in a quarter of the memory" if on_gpu else "no GPU: fp32 is exact"
    return Plan(where, compute, kind, reason)


def resolve_folder(name: str) -> Path:
    """The folder that holds a base model: the bundled one, the one named, or the hub's copy on this machine.

    Raises:
        ModelError: if there is none.
    """
    if name == "toy":
        return TOY_FOLDER
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{name} is no model folder: it has no config.json",
                hint="Point --model at a folder saved by save_pretrained().",
            )
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"no base model at {name!r}: neither a folder nor a hub id",
            hint="Use 'toy', a folder saved by save_pretrained(), or a hub id such as owner/name.",
        )
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"the base model {name!r} could not be fetched from the hub: {reason}",
            hint="Check the id and the network, or point --model at a folder.",
        ) from error


def meta_model(name: str) -> PreTrainedModel:
    """A base model's modules and shapes from its configuration alone, on the meta device: no weight is loaded.

    Raises:
        ModelError: if the configuration cannot be read.
    """
    source = resolve_folder(name) if name == "toy" or Path(name).exists() else name
    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{name} has no configuration of a causal LM that transformers can read: {reason}") from error
    return model


def load_base(
    name: str = "toy",
    *,
    quant: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    n_blocks: int = N_EDITED_BLOCKS,
) -> Base:
    """Load and freeze a base model.

    Args:
        name: `toy`, a folder saved by `save_pretrained()`, or a hub id.
        quant: `auto` (8-bit on a GPU, none on a CPU), `8bit`, `4bit` or `none`.
        dtype: `auto` (bfloat16 on a GPU, float32 on a CPU), or a dtype's name.
        device: `auto` or a torch device.
        n_blocks: how many of the last blocks edits may change.

    Raises:
        ModelError: if there is no such model, or nothing in it that can be edited.
        InputError: if an argument is unknown.
    """
    plan = plan_load(quant, dtype, device)
    folder = resolve_folder(name)
    checkpoint_files(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.is_encoder_decoder:
            raise ModelError(f"{name} is an encoder-decoder model, expected a causal LM")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = _load_model(folder, plan)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{name} is no causal LM that transformers can load: {reason}",
            hint="The folder needs config.json, safetensors weights and a tokenizer.",
        ) from error
    model.requires_grad_(False)  # a quantised load leaves norms, embeddings and head trainable
    model.train(False)
    targets = find_targets(model, n_blocks)
    _, blocks = find_blocks(model)
    return Base(
        id=name if name == "toy" or not Path(name).is_dir() else str(Path(name).resolve()),
        fingerprint=fingerprint_checkpoint(folder),
        quant=plan.quant,
        model=model,
        tokenizer=tokenizer,
        targets=targets,
        decoder=Decoder.split(model, blocks, targets[0].block, plan.device),
    )


def _load_model(folder: Path, plan: Plan) -> PreTrainedModel:
    _quiet()
    options: dict[str, Any] = {"dtype": plan.dtype, "device_map": {"": plan.device}}
    if plan.device.type == "cpu" and plan.dtype == torch.bfloat16:
        # On a CPU torch's fused attention builds a kernel for each new shape in bf16: ten times the time of its parts.
        options["attn_implementation"] = "eager"
    if plan.quant == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    elif plan.quant == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=plan.dtype
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights in place for a CPU kernel that has no gradient.
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (not in torch's types)
    return model


def _quiet() -> None:
    """Loading is reported by our own progress, not by other libraries' bars and advice."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
