"""How much memory training and editing need, from a base model's configuration alone; no weight is loaded.

An estimate: exact for weights, editor and optimiser. What texts bring is counted for texts of usual length, and of the
run's phases the one that holds most: fitting the normalisers, a training step, or a validation, which asks thousands of
tokens at once, each text under an edit of its own. tests/training/test_memory.py holds it against measured peaks.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ie.base.model import PREFIX_BUDGET_BYTES
from ie.base.plan import Plan, meta_model
from ie.base.targets import find_blocks, find_targets, module_shape
from ie.editor.editor import JOINT, Editor, EditorSettings
from ie.errors import NotEnoughMemoryError, is_out_of_memory
from ie.training.settings import TrainSettings

__all__ = ["enough_memory", "estimate_memory", "peak_memory_bytes"]

_PLAIN_TOKENS, _INSTRUCTION_TOKENS = 12, 60  # of a question, padding counted; of an instruction
_EDIT_TOKENS, _ANSWER_TOKENS = 18, 3  # the longest edit of a batch; an answer
_N_TASKS = 6  # of a dataset, where they aren't named
_N_QUERIES = 8  # of a record in a validation
_STEP_TOKENS, _ASK_TOKENS = 512, 4096  # asked at once on a CPU, in a step and in a validation
_GPU_STEP_TOKENS = 8192
_QUANTISED_BYTES = {"8bit": 1.0, "4bit": 0.5}
_LIBRARIES_BYTES = (660 if torch.version.cuda else 350) * 10**6  # Python, torch and transformers, imported
_EDITOR_COPIES, _OPTIMISER_COPIES = 3, 2  # weights, gradients, the best so far; Adam's two moments
_FREED_SHARE = 0.15  # of activations: what the allocator has of blocks that are free and too small


def estimate_memory(name: str, plan: Plan, settings: TrainSettings | None = None) -> dict[str, int]:
    """Bytes by part for training an editor, and in all for training and for a single edit.

    Args:
        name: the base model: `toy`, a folder or a hub id (only its configuration is fetched).
        plan: how it will be loaded.
        settings: of the training; None takes the defaults.

    Returns:
        `base, activations, editor, optimiser, prefix_store, libraries, training, editing`, bytes each. On a GPU
        `prefix_store` and `libraries` lie in the machine's memory, and `training` and `editing` are the GPU's.

    Raises:
        ModelError: if the configuration cannot be read, or nothing in the model can be edited.
    """
    settings = settings or TrainSettings()
    model = meta_model(name)
    _, blocks = find_blocks(model)
    targets = find_targets(model)
    with torch.device("meta"):
        shape = EditorSettings.model_validate(settings, from_attributes=True)
        editor = Editor(targets, shape.for_tasks(len(settings.tasks or ()) or _N_TASKS))
    weights = sum(p.numel() for p in editor.parameters()) * 4
    on_gpu = plan.device.type == "cuda"
    one_edit = _edit_bytes(model, len(blocks) - targets[0].block, plan, 1, settings)
    # The normalisers are fitted before there is a gradient, a moment of the optimiser or a best editor.
    fitting = _fit_bytes(model, settings) - (_EDITOR_COPIES - 1 + _OPTIMISER_COPIES) * weights
    parts = {
        "base": _base_bytes(model, blocks, plan),
        "activations": max(fitting, _activation_bytes(model, len(blocks) - targets[0].block, plan, settings)),
        "editor": _EDITOR_COPIES * weights,
        "optimiser": _OPTIMISER_COPIES * weights,
        "prefix_store": _store_bytes(model, plan, settings),
        "libraries": _LIBRARIES_BYTES,
    }
    elsewhere = parts["prefix_store"] + parts["libraries"] if on_gpu else 0
    parts["training"] = sum(parts.values()) - elsewhere
    parts["editing"] = parts["base"] + weights + one_edit + (0 if on_gpu else _LIBRARIES_BYTES)
    return parts


def _width(model: nn.Module) -> int:
    """Values that the factors A and B of one token have, all edit targets together."""
    return sum(target.d_in + target.d_out for target in find_targets(model))


def _edit_bytes(model: nn.Module, n_blocks: int, plan: Plan, n_edits: int, settings: TrainSettings) -> int:
    """What making edits holds at once: the suffix's graph, then the editor's, of all passes."""
    d_model: int = model.config.hidden_size  # type: ignore[union-attr,assignment]
    width = _width(model)
    outputs = sum(target.d_out for target in find_targets(model))  # a non-linearity written in parts keeps each of them
    graph = _EDIT_TOKENS * (width + 2 * outputs + 8 * n_blocks * d_model)
    of_pass = 3 + settings.n_layers  # normalised, a residual a layer, packed twice
    editor = _EDIT_TOKENS * width * 4 * settings.passes * of_pass
    return int(n_edits * (graph * plan.dtype.itemsize + editor))


def _fit_bytes(model: nn.Module, settings: TrainSettings) -> int:
    """Second moments of all edit targets' inputs, in double."""
    return sum(target.d_in**2 * 8 for target in find_targets(model)) if settings.n_whitened else 0


def _activation_bytes(model: nn.Module, n_blocks: int, plan: Plan, settings: TrainSettings) -> int:
    """The larger of a step's and a validation's."""
    width, d_out = _width(model), max(target.d_out for target in find_targets(model))
    n_vocab: int = model.config.vocab_size  # type: ignore[union-attr,assignment]
    factors = _EDIT_TOKENS * width * 4  # of one edit, or of one text under it

    def asked(n_tokens: int, copies: int) -> int:
        n_texts = n_tokens // _PLAIN_TOKENS
        logits = n_texts * _ANSWER_TOKENS * n_vocab * plan.dtype.itemsize
        return copies * (n_texts * factors + logits) + 3 * n_tokens * d_out * plan.dtype.itemsize

    made = _edit_bytes(model, n_blocks, plan, settings.batch_size, settings) + _solve_bytes(model, settings)
    per_edit = 3 + settings.n_negatives
    n_step = _STEP_TOKENS if plan.device.type == "cpu" else _GPU_STEP_TOKENS
    n_kept = settings.batch_size * (1 + settings.n_negatives)
    reference = n_kept * _ANSWER_TOKENS * n_vocab * plan.dtype.itemsize
    step = made + reference + asked(min(n_step, settings.batch_size * per_edit * _PLAIN_TOKENS), copies=2)
    n_asked = min(_ASK_TOKENS, settings.n_validation * _N_QUERIES * _PLAIN_TOKENS)
    validation = settings.n_validation * factors + max(asked(n_asked, copies=1), made)
    return int((1 + _FREED_SHARE) * max(step, validation))


def _solve_bytes(model: nn.Module, settings: TrainSettings) -> int:
    """What joint edits' least squares keep of each pass for the gradient, in double: KᵀK or KKᵀ and its factor; KᵀD, X
    and sums of X, or K, D and solutions.
    """
    if settings.method != JOINT:
        return 0
    n_tokens = settings.batch_size * _EDIT_TOKENS
    sizes = [(min(n_tokens, target.d_in), target.d_out) for target in find_targets(model)]
    return settings.passes * sum((2 * size**2 + 3 * size * d_out) * 8 for size, d_out in sizes)


def _store_bytes(model: nn.Module, plan: Plan, settings: TrainSettings) -> int:
    """Hidden states of all texts that a run meets, none of them twice, as far as memory may hold them."""
    told = _INSTRUCTION_TOKENS + _PLAIN_TOKENS
    of_step = settings.batch_size * (told + (3 + settings.n_negatives) * 1.5 * _PLAIN_TOKENS)
    of_fit = settings.n_fit * (_PLAIN_TOKENS + _N_TASKS * _INSTRUCTION_TOKENS)
    of_validation = settings.n_validation * (told + _N_QUERIES * _PLAIN_TOKENS)
    n_tokens = settings.steps * of_step + of_fit + of_validation
    d_model: int = model.config.hidden_size  # type: ignore[union-attr,assignment]
    return int(min(PREFIX_BUDGET_BYTES, n_tokens * d_model * plan.dtype.itemsize))


@contextmanager
def enough_memory(name: str, plan: Plan, settings: TrainSettings) -> Iterator[None]:
    """Say what a training needs, and what to lower, where memory runs out.

    Raises:
        NotEnoughMemoryError: instead of whatever torch or Python raised.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        parts = estimate_memory(name, plan, settings)
        shown = ", ".join(f"{part.replace('_', ' ')} {_size(n)}" for part, n in parts.items() if part != "editing")
        quant = "" if plan.quant == "4bit" else ", or take --quant " + ("4bit" if plan.quant == "8bit" else "8bit")
        raise NotEnoughMemoryError(
            f"out of memory on {plan.device}: this training needs about {_size(parts['training'])} ({shown})",
            hint=f"lower --batch-size ({settings.batch_size}), or in --config rank ({settings.rank}) or n_validation "
            f"({settings.n_validation}){quant}; `ie doctor --model {name}` estimates",
        ) from error


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def _base_bytes(model: nn.Module, blocks: nn.ModuleList, plan: Plan) -> int:
    """Quantising packs the blocks' linear weights; embeddings, norms and head stay as they are."""
    packed = {
        id(module.weight)
        for module in blocks.modules()
        if module_shape(module) is not None and plan.quant in _QUANTISED_BYTES
    }
    small = _QUANTISED_BYTES.get(plan.quant, 0.0)
    return int(sum(p.numel() * (small if id(p) in packed else plan.dtype.itemsize) for p in model.parameters()))


def peak_memory_bytes() -> int:
    """The most memory that this process has held: of the GPU if it used one, else of the machine."""
    if torch.cuda.is_available() and (of_gpu := torch.cuda.max_memory_allocated()):
        return int(of_gpu)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held when it started this process
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
