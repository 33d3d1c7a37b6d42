"""An edit in passes: each takes the gradient on the model as edited so far, and goes a step further.

    A, B_1 from the base's signals,    B_k from the signals under A, B_1 + ... + B_k-1,    ΔW = (B_1 + ... + B_p)ᵀ A

The request is read as a user will ask it, plain: activations behind an instruction fit plain questions less well. Its
instruction steers what is made of them. Keys stay those of the first pass, so that the update's rank is one for each
token however many passes there are. MEND and InstructEdit take one pass; a single gradient need not point to where the
target is likely, and a network must then make up what a second look would show (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ie.base.capture import Signals
from ie.base.instructions import Readings
from ie.base.model import Base
from ie.base.update import Factors, Update, on_top
from ie.data.tokens import TokenBatch
from ie.editor.editor import Editor
from ie.editor.request import EditRequest, collate_requests, plain

__all__ = ["observe", "propose"]


def observe(base: Base, editor: Editor, requests: Sequence[EditRequest]) -> None:
    """Take requests into the statistics that `Editor.fit` then sets: the base's own signals, and instructions."""
    batch, told = _asked(base, editor, requests)
    editor.observe(base.signals(batch), told)


def propose(
    base: Base, editor: Editor, requests: Sequence[EditRequest], so_far: Update | None = None
) -> tuple[Signals, dict[str, Factors]]:
    """The updates of a batch of edits, part of the editor's graph.

    Args:
        base: the base model.
        editor: what makes the updates.
        requests: n independent edits.
        so_far: the edits that the model is under already, a batch of one; None for the base itself.

    Returns:
        The signals of the first pass, and the n updates.
    """
    batch, told = _asked(base, editor, requests)
    signals = base.signals(batch, so_far)
    update = _update(base, editor, signals, told)
    keys = {name: a for name, (a, _) in update.items()}
    for _ in range(editor.settings.passes - 1):
        made = {name: (a.detach(), b.detach()) for name, (a, b) in update.items()}
        again = base.signals(batch, on_top(so_far, made) if so_far else made, like=signals)
        step = _update(base, editor, again, told, keys)
        update = {name: (a, b + step[name][1]) for name, (a, b) in update.items()}
    return signals, update


def _asked(base: Base, editor: Editor, requests: Sequence[EditRequest]) -> tuple[TokenBatch, Readings | None]:
    """The requests as a user will ask them, and what was read of their instructions."""
    batch = collate_requests(base, plain(requests))
    if not editor.settings.reads_instructions:
        return batch, None
    return batch, base.read([one.instruction for one in requests], batch.texts)


def _update(
    base: Base, editor: Editor, signals: Signals, told: Readings | None, keys: Mapping[str, Tensor] | None = None
) -> dict[str, Factors]:
    """One pass, with the editor's matrix products in bf16 beside a base in bf16: as fast there as the base's own."""
    with torch.autocast(base.device.type, torch.bfloat16, enabled=base.model.dtype == torch.bfloat16):
        return editor.update(signals, told, keys)
