"""How much memory training and editing need, from a base model's configuration alone; no weight is loaded.

An estimate: exact for weights, editor and optimiser; activations are counted for texts of usual length
(`_PLAIN_TOKENS`, `_INSTRUCTED_TOKENS`), and what libraries take for themselves is not counted.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
from torch import nn

from ie.base.model import PREFIX_BUDGET_BYTES, REFERENCE_BUDGET_BYTES
from ie.base.plan import Plan, meta_model
from ie.base.targets import find_blocks, find_targets, module_shape
from ie.editor.editor import Editor, EditorSettings
from ie.training.settings import TrainSettings

__all__ = ["estimate_memory", "peak_memory_bytes"]

_PLAIN_TOKENS, _INSTRUCTED_TOKENS = 16, 80
_ANSWER_TOKENS = 4
_QUANTISED_BYTES = {"8bit": 1.0, "4bit": 0.5}
_COPIES = 5  # of the editor in training: weights, gradients, Adam's two moments, the best so far


def estimate_memory(name: str, plan: Plan, settings: TrainSettings | None = None) -> dict[str, int]:
    """Bytes by part for training an editor, and in all for training and for a single edit.

    Args:
        name: the base model: `toy`, a folder or a hub id (only its configuration is fetched).
        plan: how it will be loaded.
        settings: of the training; None takes the defaults.

    Returns:
        `base, editor, activations, stores_at_most, training, editing`, bytes each. `stores_at_most` are the budgets of
        what is computed once and kept, in the machine's memory; `training` counts it.

    Raises:
        ModelError: if the configuration cannot be read, or nothing in the model can be edited.
    """
    settings = settings or TrainSettings()
    model = meta_model(name)
    _, blocks = find_blocks(model)
    targets = find_targets(model)
    with torch.device("meta"):
        editor = Editor(targets, EditorSettings(rank=settings.rank, n_layers=settings.n_layers))
    editor_bytes = sum(p.numel() for p in editor.parameters()) * 4
    base_bytes = _base_bytes(model, blocks, plan)
    width = sum(target.d_in + target.d_out for target in targets)
    saved = width + 8 * (len(blocks) - targets[0].block) * model.config.hidden_size  # values kept a token for backward
    n_plain = settings.batch_size * (2 * settings.plain_share + 1 + settings.n_negatives)
    n_instructed = settings.batch_size * 2 * (1 - settings.plain_share)
    n_tokens = n_plain * _PLAIN_TOKENS + n_instructed * _INSTRUCTED_TOKENS
    n_logits = (n_plain + n_instructed) * _ANSWER_TOKENS * model.config.vocab_size
    activations = int(n_tokens * saved * plan.dtype.itemsize + 4 * n_logits * 4)
    one_edit = int(_INSTRUCTED_TOKENS * saved * plan.dtype.itemsize + _INSTRUCTED_TOKENS * width * 4)
    stores = PREFIX_BUDGET_BYTES + REFERENCE_BUDGET_BYTES
    return {
        "base": base_bytes,
        "editor": _COPIES * editor_bytes,
        "activations": activations,
        "stores_at_most": stores,
        "training": base_bytes + _COPIES * editor_bytes + activations + stores,
        "editing": base_bytes + editor_bytes + one_edit,
    }


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
    """The most memory that this process has held: of the GPU if there is one, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held when it started this process
        peak = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
