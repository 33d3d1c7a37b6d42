"""Editing methods behind one face: edit requests in, low-rank updates out.

Beside trained editors stand two that need no training and show what training gives:

    gradient   normalised signals, no network, one rate: MEND's editor before its first step
    finetune   a few steps of gradient descent on the edit targets, each step of bounded size, as FT-L bounds its own
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ie.base.capture import Signals
from ie.base.model import Base
from ie.base.update import Factors, Update
from ie.editor.editor import Editor, EditorSettings
from ie.editor.request import EditRequest, collate_requests

__all__ = ["Method", "editor_method", "finetune_method", "gradient_method"]

Method = Callable[[Base, Sequence[EditRequest]], Update]

_N_STEPS = 5


def editor_method(editor: Editor) -> Method:
    """A trained editor; one of `mend` reads no instruction."""
    reads = editor.settings.method == "instructedit"

    def edit(base: Base, requests: Sequence[EditRequest]) -> Update:
        seen = [r if reads else EditRequest(r.prompt, r.target) for r in requests]
        with torch.no_grad():
            return editor.update(base.signals(collate_requests(base, seen)))

    return edit


def gradient_method(base: Base, fitted_on: Sequence[EditRequest], rate: float, batch_size: int = 32) -> Method:
    """Normalised signals with one rate.

    Args:
        base: the base model.
        fitted_on: training requests that the normaliser is fitted on.
        rate: the rate of every edit target.
        batch_size: requests in one pass while fitting.
    """
    editor = Editor(base.targets, EditorSettings(method="mend", rate=rate, n_layers=0)).to(base.device)
    for start in range(0, len(fitted_on), batch_size):
        editor.observe(base.signals(collate_requests(base, _plain(fitted_on[start : start + batch_size]))))
    editor.fit()
    return editor_method(editor)


def finetune_method(rate: float) -> Method:
    """Gradient descent on the edit alone, plain: steps of one size.

    Args:
        rate: Frobenius norm of one step's change of one module, so no module moves further than `_N_STEPS` times it.
    """

    def edit(base: Base, requests: Sequence[EditRequest]) -> Update:
        batch = collate_requests(base, _plain(requests))
        update: dict[str, Factors] = {}
        for _ in range(_N_STEPS):
            step = _gradient(base, base.signals(batch, update or None))
            for name, (a, b) in step.items():
                # ‖BᵀA‖² is the sum of (BBᵀ) ∘ (AAᵀ): the dense gradient is never formed.
                norm = (torch.bmm(a, a.mT) * torch.bmm(b, b.mT)).sum((1, 2)).clamp(min=1e-30).sqrt()
                scaled = (a, b * (rate / norm)[:, None, None])
                old = update.get(name)
                update[name] = scaled if old is None else (torch.cat((old[0], a), 1), torch.cat((old[1], scaled[1]), 1))
        return update

    return edit


def _gradient(base: Base, signals: Signals) -> Update:
    plain = Editor(base.targets, EditorSettings(method="mend", rate=1.0, n_layers=0)).to(base.device)
    with torch.no_grad():
        return plain.update(signals)


def _plain(requests: Sequence[EditRequest]) -> list[EditRequest]:
    return [EditRequest(request.prompt, request.target) for request in requests]
