"""Editing methods behind one face: edit requests in, low-rank updates out.

Beside trained editors stand three that need no training and show what training gives:

    gradient   normalised signals, no network, one rate: MEND's editor before its first step
    ultra      the same, then least squares in place of the sum over tokens (UltraEdit, arXiv 2505.14679)
    finetune   a few steps of gradient descent on the edit targets, each step of bounded size, as FT-L bounds its own
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch

from ie.base.capture import Signals
from ie.base.model import Base
from ie.base.update import Factors, Update
from ie.editor.editor import JOINT, Editor, EditorSettings
from ie.editor.passes import observe, propose_alone, propose_in_use, propose_jointly
from ie.editor.request import EditRequest, collate_requests, plain

__all__ = [
    "Method",
    "editor_method",
    "finetune_method",
    "fitted_editor",
    "gradient_method",
    "joint_update",
    "ultra_method",
    "update_under",
]

Method = Callable[[Base, Sequence[EditRequest]], Update]


def editor_method(editor: Editor) -> Method:
    """A trained editor; one of `mend` reads no instruction."""

    def edit(base: Base, requests: Sequence[EditRequest]) -> Update:
        return update_under(base, editor, requests, None)

    return edit


@torch.no_grad()
def update_under(
    base: Base, editor: Editor, requests: Sequence[EditRequest], so_far: Update | None
) -> dict[str, Factors]:
    """What an editor makes of edits on the model as edited so far.

    Args:
        base: the base model.
        editor: the editor.
        requests: n independent edits.
        so_far: the edits that the model is under already, a batch of one; None for the base itself.

    Returns:
        The n edits' own updates, without those so far.
    """
    if editor.settings.method == JOINT:
        return propose_alone(base, editor, requests, editor.regularisations(), so_far)
    return propose_in_use(base, editor, requests, so_far)


def joint_update(
    base: Base, editor: Editor, requests: Sequence[EditRequest], regularisation: float | None, batch_size: int = 64
) -> dict[str, Factors]:
    """One update for all edits, by least squares over all their tokens; see `ie.editor.least_squares`.

    Args:
        base: the base model.
        editor: what makes each edit's own update.
        requests: the edits, at least one.
        regularisation: λ, see `ie.editor.least_squares`; None takes the editor's.
        batch_size: requests that are captured together.

    Returns:
        See `propose_jointly`.

    Raises:
        EditorError: if it is not finite.
    """
    alike = sorted(requests, key=lambda one: len(one.prompt) + len(one.target))  # of like length: less padding
    batches = [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    given = editor.regularisations() if regularisation is None else dict.fromkeys(_names(base), regularisation)
    with torch.no_grad():
        return propose_jointly(base, editor, batches, given)


def fitted_editor(base: Base, fitted_on: Sequence[EditRequest], rate: float = 1.0, batch_size: int = 32) -> Editor:
    """An editor without a network: normalised signals with one rate; it reads no instruction.

    Args:
        base: the base model.
        fitted_on: training requests that the normaliser is fitted on.
        rate: the rate of every edit target.
        batch_size: requests in one pass while fitting.
    """
    editor = Editor(base.targets, EditorSettings(method="mend", rate=rate, n_layers=0)).to(base.device)
    for start in range(0, len(fitted_on), batch_size):
        observe(base, editor, fitted_on[start : start + batch_size])
    editor.fit()
    return editor


def gradient_method(fitted: Editor, rate: float) -> Method:
    """Normalised signals with one rate, summed over tokens.

    Args:
        fitted: what `fitted_editor` returned.
        rate: the rate of every edit target.
    """
    return editor_method(_with_rate(fitted, rate))


def ultra_method(fitted: Editor, rate: float, regularisation: float) -> Method:
    """Normalised signals with one rate, then the least squares of each edit's tokens.

    Args:
        fitted: what `fitted_editor` returned.
        rate: the rate of every edit target.
        regularisation: λ, see `ie.editor.least_squares`.
    """
    editor = _with_rate(fitted, rate)

    @torch.no_grad()
    def edit(base: Base, requests: Sequence[EditRequest]) -> Update:
        return propose_alone(base, editor, requests, dict.fromkeys(_names(base), regularisation))

    return edit


@torch.no_grad()
def _with_rate(editor: Editor, rate: float) -> Editor:
    """The same editor with another rate: settings to choose from need one fit."""
    other = copy.deepcopy(editor)
    for logarithms in other.log_rates.parameters():
        logarithms[0] += math.log(rate / editor.settings.rate)
    return other


def finetune_method(rate: float, steps: int = 5) -> Method:
    """Gradient descent on the edit alone, plain: steps of one size.

    Args:
        rate: Frobenius norm of one step's change of one module, so no module moves further than `steps` times it.
        steps: how many steps are taken.
    """

    def edit(base: Base, requests: Sequence[EditRequest]) -> Update:
        batch = collate_requests(base, plain(requests))
        update: dict[str, Factors] = {}
        for _ in range(steps):
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
    identity = Editor(base.targets, EditorSettings(method="mend", rate=1.0, n_layers=0)).to(base.device)
    with torch.no_grad():
        return identity.update(signals)


def _names(base: Base) -> list[str]:
    return [target.name for target in base.targets]
