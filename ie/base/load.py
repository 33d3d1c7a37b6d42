"""Loading a base model: the bundled toy, a folder, or a hub id; whole, in 8 bits or in 4."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ie.adapter import CONFIG as ADAPTER_CONFIG
from ie.base.eightbit import multiply_in_own_dtype
from ie.base.fingerprint import checkpoint_files, fingerprint_checkpoint
from ie.base.model import Base
from ie.base.plan import Plan, is_here, plan_load, resolve_folder
from ie.base.precision import with_faster_dtype
from ie.base.suffix import Decoder
from ie.base.targets import N_EDITED_BLOCKS, find_blocks, find_targets, module_shape
from ie.errors import InputError, ModelError
from ie.source import local_folder

__all__ = ["load_base"]

_MAX_SHOWN = 4  # names in an error


def load_base(
    name: str = "toy",
    *,
    quant: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    n_blocks: int = N_EDITED_BLOCKS,
    device_map: str | None = None,
) -> Base:
    """Load and freeze a base model. On a GPU cuDNN's attention is turned off for the whole process.

    Args:
        name: `toy`, a folder saved by `save_pretrained()`, or a hub id.
        quant: `auto` (8-bit on a GPU, none on a CPU), `8bit`, `4bit` or `none`.
        dtype: `auto` (bfloat16 on a GPU; on a CPU float32, or bfloat16 where that is measured to be faster), or a
            dtype's name.
        device: `auto` or a torch device.
        n_blocks: how many of the last blocks edits may change.
        device_map: `auto` spreads the model over all devices, for one that none of them holds; None puts it on one.

    Raises:
        ModelError: if there is no such model, or nothing in it that can be edited.
        InputError: if an argument is unknown, there is no such device, or bitsandbytes is missing.
    """
    plan = plan_load(quant, dtype, device)
    if not is_here(plan.device):
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise InputError(f"no device {device!r}: torch sees {n_gpus} GPUs", hint="`ie doctor` says what is there")
    if plan.quant != "none" and find_spec("bitsandbytes") is None:
        raise InputError(
            f"quant {plan.quant!r} needs bitsandbytes, which is not installed", hint="or take --quant none"
        )
    folder = resolve_folder(name)
    checkpoint_files(folder)
    if (folder / ADAPTER_CONFIG).exists():
        # With PEFT installed transformers would load it on top, without a word and without checking the base's weights.
        raise ModelError(
            f"{name} holds a PEFT adapter beside its weights ({ADAPTER_CONFIG})",
            hint="merge it with PEFT, or move it elsewhere and apply it with `ie apply-patch`",
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.is_encoder_decoder:
            raise ModelError(f"{name} is an encoder-decoder model, expected a causal LM")
        if dtype == "auto":
            plan = with_faster_dtype(plan, name)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = _load_model(folder, plan, device_map)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{name} is no causal LM that transformers can load: {reason}",
            hint="the folder needs config.json, safetensors weights and a tokenizer, and no code of its own",
        ) from error
    model.requires_grad_(False)  # a quantised load leaves norms, embeddings and head trainable
    model.train(False)
    targets = find_targets(model, n_blocks)
    _, blocks = find_blocks(model)
    return Base(
        id=name if name == "toy" or local_folder(name) is None else str(folder.resolve()),
        folder=folder,
        fingerprint=fingerprint_checkpoint(folder),
        quant=plan.quant,
        reason=plan.reason,
        model=model,
        tokenizer=tokenizer,
        targets=targets,
        decoder=Decoder.split(model, blocks, targets[0].block, plan.device),
    )


def _load_model(folder: Path, plan: Plan, device_map: str | None) -> PreTrainedModel:
    _quiet()
    options: dict[str, Any] = {"dtype": plan.dtype, "device_map": device_map or {"": plan.device}}
    if plan.device.type == "cpu" and plan.dtype == torch.bfloat16:
        # On a CPU torch's fused attention builds a kernel for each new shape in bf16: ten times the time of its parts.
        options["attn_implementation"] = "eager"
    if plan.device.type == "cuda":
        # On Hopper torch prefers cuDNN's, which plans anew for each new shape: a third of a training step and more.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if plan.quant == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    elif plan.quant == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=plan.dtype
        )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    model: PreTrainedModel = loaded[0]
    _check_complete(folder, model, loaded[1])
    if plan.quant == "8bit":
        multiply_in_own_dtype(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights in place for a CPU kernel that has no gradient.
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (not in torch's types)
    return model


def _check_complete(folder: Path, model: PreTrainedModel, info: Any) -> None:
    """Refuse a checkpoint that lacks weights of its own architecture: transformers would draw them at random."""
    of_another_shape = [name for name, *_ in info["mismatched_keys"]]
    wrong = sorted({*info["missing_keys"], *of_another_shape, *_misshapen(model)})
    if wrong:
        more = f" and {len(wrong) - _MAX_SHOWN} more" if len(wrong) > _MAX_SHOWN else ""
        raise ModelError(
            f"{folder} has no weights, or some of another shape, for {', '.join(wrong[:_MAX_SHOWN])}{more}",
            hint="its config.json and its weights are not of one model, or a file is missing",
        )


def _misshapen(model: PreTrainedModel) -> list[str]:
    """Weights of quantised modules that are not of their module's shape, which transformers doesn't see."""
    found = []
    for name, module in model.named_modules():
        weight, shape = getattr(module, "weight", None), module_shape(module)
        packed = getattr(weight, "quant_state", None)  # of 4 bits
        stored = tuple(packed.shape if packed is not None else getattr(weight, "shape", ()))
        if shape is not None and stored not in (shape, shape[::-1]):
            found.append(f"{name}.weight")
    return found


def _quiet() -> None:
    """Loading is reported by our own progress, not by other libraries' bars and advice."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if logging.getLogger().level == logging.DEBUG:
        return  # a user who looks for a fault (`--debug`) wants to read them
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
