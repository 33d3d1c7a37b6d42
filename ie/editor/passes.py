"""An edit in passes: each takes the gradient on the model as edited so far, and goes a step further.

    A, B_1 from the base's signals,    B_k from the signals under A, B_1 + ... + B_k-1,    ΔW = (B_1 + ... + B_p)ᵀ A

The request is read as a user will ask it, plain: activations behind an instruction fit plain questions less well. Its
instruction says which kind of edit this is. Keys stay those of the first pass, so that the update's rank is one for
each token however many passes there are. MEND and InstructEdit take one pass; a single gradient need not point to where
the target is likely, and a network must then make up what a second look would show (docs/experiments.md).

Once trained, an editor takes `FINER` times as many passes, each by so much shorter. It looks more often where it is
going and disturbs less on its way; training learns as much from few passes and costs less (docs/experiments.md).

An edit whose target is not what the model would write after these passes goes on, a pass at a time, until it is, for at
most `FURTHER` times as many more. Those that have taken are left as they are.

Of many edits that become one update by least squares (`ie.editor.least_squares`) the passes are joint ones: each takes
all edits' signals under the joint update so far. There an edit asks for less as its target becomes likely, so that
those which took early do not go on pulling at the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ie.base.capture import Signals
from ie.base.model import Base
from ie.base.update import Factors, Update, bounded, on_top
from ie.data.tokens import TokenBatch
from ie.editor.editor import JOINT, Editor, Method
from ie.editor.least_squares import Joint, Regularisations, each_alone
from ie.editor.request import EditRequest, collate_requests, plain

__all__ = [
    "FINER",
    "FURTHER",
    "finer_in_use",
    "observe",
    "propose",
    "propose_alone",
    "propose_in_use",
    "propose_jointly",
]

FINER, FURTHER = 3, 3


def observe(base: Base, editor: Editor, requests: Sequence[EditRequest]) -> None:
    """Take the base's own signals of requests into the statistics that `Editor.fit` then sets."""
    editor.observe(base.signals(collate_requests(base, plain(requests))))


def finer_in_use(method: Method, passes: int) -> int:
    """How many passes a trained editor takes for each of its training's.

    A single pass is the published methods' edit, and stays one; joint edits are made as they were trained.
    """
    return FINER if passes > 1 and method != JOINT else 1


def propose(
    base: Base, editor: Editor, requests: Sequence[EditRequest], so_far: Update | None = None, *, finer: int = 1
) -> tuple[Signals, dict[str, Factors]]:
    """The updates of a batch of edits, part of the editor's graph.

    Args:
        base: the base model.
        editor: what makes the updates.
        requests: n independent edits.
        so_far: the edits that the model is under already, a batch of one; None for the base itself.
        finer: how many passes are taken for each of the editor's, every one by so much shorter.

    Returns:
        The signals of the first pass, and the n updates.
    """
    batch, kinds = _asked(base, editor, requests)
    signals = base.signals(batch, so_far)
    update = _shortened(_update(base, editor, signals, kinds), finer)
    keys = {name: a for name, (a, _) in update.items()}
    for _ in range(finer * editor.settings.passes - 1):
        again = base.signals(batch, _added(so_far, update), like=signals)
        step = _shortened(_update(base, editor, again, kinds, keys), finer)
        update = {name: (a, b + step[name][1]) for name, (a, b) in update.items()}
    return signals, update


@torch.no_grad()
def propose_in_use(
    base: Base, editor: Editor, requests: Sequence[EditRequest], so_far: Update | None = None
) -> dict[str, Factors]:
    """The updates of a batch of edits by a trained editor: in finer passes, and further ones until they take.

    Args:
        base: see `propose`.
        editor: see `propose`.
        requests: see `propose`.
        so_far: see `propose`.
    """
    passes = editor.settings.passes
    finer = finer_in_use(editor.settings.method, passes)
    signals, update = propose(base, editor, requests, so_far, finer=finer)
    if passes == 1:
        return update
    batch, kinds = _asked(base, editor, requests)
    rows, part, own = list(range(len(requests))), batch, update
    for _ in range(FURTHER * finer * passes):
        rows = [row for row, took in zip(rows, _took(base, part, _added(so_far, own)), strict=True) if not took]
        if not rows:
            break
        part, own = base.collate([batch.texts[row] for row in rows]), _of(update, rows)
        again = base.signals(part, _added(so_far, own), like=signals.of(rows))
        keys = {name: a for name, (a, _) in own.items()}
        step = _shortened(_update(base, editor, again, kinds if kinds is None else kinds[rows], keys), finer)
        for name, (_, b) in step.items():
            update[name][1][rows, : b.shape[1]] += b
        own = _of(update, rows)
    return update


def propose_jointly(
    base: Base, editor: Editor, batches: Sequence[Sequence[EditRequest]], regularisations: Regularisations
) -> dict[str, Factors]:
    """One update for all edits, part of the editor's graph.

    Args:
        base: the base model.
        editor: what makes each edit's own part.
        batches: the edits, as many at a time as are captured together; at least one.
        regularisations: see `Joint`.

    Returns:
        By module path A (1, r, d_in) and B (1, r, d_out), float32, with r of at most min(d_in, d_out).

    Raises:
        EditorError: if it is not finite.
    """
    update: dict[str, Factors] = {}
    at_first: list[Tensor] = []
    for number in range(editor.settings.passes):
        joint = Joint(editor, regularisations)
        for index, requests in enumerate(batches):
            batch, kinds = _asked(base, editor, requests)
            signals = base.signals(batch, _added(None, update))
            if number == 0:
                at_first.append(editor.sizes(signals))
            joint.add(signals, _eased(editor, signals, _update(base, editor, signals, kinds), at_first[index]))
        update = bounded(on_top(update, joint.solve())) if update else joint.solve()
    return update


def propose_alone(
    base: Base,
    editor: Editor,
    requests: Sequence[EditRequest],
    regularisations: Regularisations,
    so_far: Update | None = None,
) -> dict[str, Factors]:
    """What `propose_jointly` makes of each of a batch of edits by itself: n edits that stay n edits.

    Args:
        base: see `propose`.
        editor: see `propose`.
        requests: see `propose`.
        regularisations: see `Joint`.
        so_far: see `propose`.
    """
    batch, kinds = _asked(base, editor, requests)
    update: dict[str, Factors] = {}
    at_first: Tensor | None = None
    for _ in range(editor.settings.passes):
        signals = base.signals(batch, _added(so_far, update))
        at_first = editor.sizes(signals) if at_first is None else at_first
        step = _eased(editor, signals, _update(base, editor, signals, kinds), at_first)
        step = each_alone(editor, signals, step, regularisations)
        update = bounded(on_top(update, step)) if update else step
    return update


def _took(base: Base, batch: TokenBatch, update: Update | None) -> list[bool]:
    """Of each request whether its whole answer is what the model would write, each under its own edit."""
    each = torch.arange(len(batch.texts), device=base.device)
    wrong = base.logits(batch, update, each).argmax(-1) != batch.labels
    return (torch.bincount(batch.rows[wrong], minlength=len(each)) == 0).tolist()


def _of(update: Update, rows: list[int]) -> dict[str, Factors]:
    """Some of a batch's edits."""
    return {name: (a[rows], b[rows]) for name, (a, b) in update.items()}


def _added(so_far: Update | None, update: Update) -> Update | None:
    """What the model is under while the next gradient is taken: a constant to the editor's graph."""
    made = {name: (a.detach(), b.detach()) for name, (a, b) in update.items()}
    return on_top(so_far, made) if so_far and made else made or so_far


def _shortened(update: Update, finer: int) -> dict[str, Factors]:
    return {name: (a, b / finer) for name, (a, b) in update.items()}


def _eased(editor: Editor, signals: Signals, update: Update, at_first: Tensor) -> dict[str, Factors]:
    """Updates as large as what is left of each edit's gradient, `at_first` being its size in the first pass."""
    left = (editor.sizes(signals) / at_first).clamp(max=1)
    return {name: (a, b * left[:, None, None]) for name, (a, b) in update.items()}


def _asked(base: Base, editor: Editor, requests: Sequence[EditRequest]) -> tuple[TokenBatch, Tensor | None]:
    """The requests as a user will ask them, and the shares (n, n_kinds + 1) of kinds that instructions tell of."""
    batch = collate_requests(base, plain(requests))
    if editor.kinds is None:
        return batch, None
    return batch, editor.kinds(base.read([one.instruction for one in requests], batch.texts))


def _update(
    base: Base, editor: Editor, signals: Signals, kinds: Tensor | None, keys: Mapping[str, Tensor] | None = None
) -> dict[str, Factors]:
    """One pass, with the editor's matrix products in bf16 beside a base in bf16: as fast there as the base's own."""
    with torch.autocast(base.device.type, torch.bfloat16, enabled=base.model.dtype == torch.bfloat16):
        return editor.update(signals, kinds, keys)
