"""The outer loss of a batch of episodes (MEND, eq. 4; InstructEdit, eq. 3) and its gradient.

    L = NLL(edited model | wanted answers) + c · KL(base || edited model | answers to keep)

NLL is taken on the edit prompt and on a rephrase, not on the edit prompt alone as published code does: generalization
is trained, not hoped for. It is the whole answer's, a sum over its tokens: greedy decoding must get every token of a
long name right. KL is taken at the positions that predict the answer, over the whole vocabulary.

Queries are asked in chunks of like length, each chunk's backward pass following its forward pass at once, down to the
update's factors; what they gathered then goes through the editor once. So memory follows the chunk and not the batch,
but for the base's own logits of what must stay, and the gradient is that of the whole loss.

Where a batch's edits are stacked, each must hold under others that know nothing of it, as patches of a served model do.

An editor of `instructedit-joint` makes one update of the whole batch by least squares (MALMEN, arXiv 2311.04661), and
every question is asked under it; gradients reach the editor and λ through the solve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ie.base.asking import Ask, by_length
from ie.base.likelihood import nll, slices
from ie.base.model import Base
from ie.base.update import stacked
from ie.data.tokens import Text
from ie.editor.editor import JOINT, Editor
from ie.editor.passes import propose, propose_jointly
from ie.training.episodes import Episodes

__all__ = ["Loss", "backward"]

_CHUNK_TOKENS, _GPU_CHUNK_TOKENS = 512, 8192  # what suits a CPU's caches; what keeps a GPU busy
_REFERENCE_TOKENS = 4096  # where nothing is held for a backward pass
_FEW_TOKENS = 32  # of edits, up to which their ranks hardly matter beside the base's own products


@dataclass(frozen=True)
class Loss:
    """Losses of a batch of episodes, each a mean over its queries, () float32."""

    edit: Tensor
    locality: Tensor


def backward(
    base: Base, editor: Editor, episodes: Episodes, locality_weight: float, whole: Episodes | None = None
) -> Loss:
    """Edit, ask every query under its edit, and add the loss's gradient to that of the editor's parameters.

    Where `episodes` are a share of a batch, `whole` is the batch: shares' losses and gradients then add up to its own.
    """
    asks = [*episodes.wanted, *episodes.kept]
    n_tokens = _CHUNK_TOKENS
    if base.device.type != "cpu":
        n_tokens = _GPU_CHUNK_TOKENS
        # A GPU is told of the prefix's many blocks slower than it runs them: once for all that a step will read.
        requests = [Ask(one.prompt, one.target, None, i, ended=True) for i, one in enumerate(episodes.requests)]
        for _, texts in by_length(base, list(dict.fromkeys([*asks, *requests])), n_tokens):
            base.prefixes.get(texts)
    ranks: list[int] | None = None  # of each edit's update; None where questions are asked under sums
    if editor.settings.method == JOINT:
        update = propose_jointly(base, editor, [episodes.requests], editor.regularisations())
        asks = [replace(ask, edit=0) for ask in asks]
    else:
        signals, update = propose(base, editor, episodes.requests)
        ranks = signals.n_tokens()
        if episodes.n_stacks:
            update, ranks = stacked(update, episodes.n_stacks), None
            asks = [replace(ask, edit=ask.edit % episodes.n_stacks) for ask in asks]
    leaves = {name: (a.detach().requires_grad_(), b.detach().requires_grad_()) for name, (a, b) in update.items()}
    edit = locality = torch.zeros((), device=base.device)
    whole = whole or episodes
    n_wanted, n_kept = len(whole.wanted), max(1, len(whole.kept))
    n_own = len(episodes.wanted)
    # The cost of an edit follows its rank: questions under edits of a few tokens aren't asked beside those of many. The
    # factors of a sum are too large to be copied for every question under it: one sum at a time.
    groups = [(max(_FEW_TOKENS, ranks[ask.edit]) - 1).bit_length() if ranks else ask.edit for ask in asks]
    reference = _reference(base, episodes.kept, max(n_tokens, _REFERENCE_TOKENS))
    for indices, texts in by_length(base, asks, n_tokens, groups):
        # Wanted queries first, so that their logits stand before those of the queries to keep.
        order = sorted(range(len(indices)), key=lambda i: indices[i] >= n_own)
        batch = base.collate([texts[i] for i in order])
        edits = torch.tensor([asks[indices[i]].edit for i in order], device=base.device)
        n_texts = sum(index < n_own for index in indices)
        n_answer = int((batch.rows < n_texts).sum())

        if ranks:
            rank = max(ranks[asks[i].edit] for i in indices)
            under, rows = {name: (a[:, :rank], b[:, :rank]) for name, (a, b) in leaves.items()}, edits
        else:
            under, rows = {name: (a[edits[:1]], b[edits[:1]]) for name, (a, b) in leaves.items()}, None
        logits = base.logits(batch, under, rows)
        found, gradient = logits.detach(), torch.empty_like(logits)
        surprise, _ = nll(found[:n_answer], batch.labels[:n_answer], 1 / n_wanted, gradient[:n_answer])
        kept = [reference[text] for text in batch.texts[n_texts:]]
        kl = _kl(found[n_answer:], kept, locality_weight / n_kept, gradient[n_answer:])
        logits.backward(gradient)  # type: ignore[no-untyped-call]
        edit, locality = edit + surprise / n_wanted, locality + kl / n_kept
    pairs = [pair for name, factors in update.items() for pair in zip(factors, leaves[name], strict=True)]
    made = [(one, leaf.grad) for one, leaf in pairs if one.requires_grad]  # a joint update's keys are the base's own
    torch.autograd.backward([one for one, _ in made], [gradient for _, gradient in made])
    return Loss(edit, locality)


def _reference(base: Base, kept: Sequence[Ask], n_tokens: int) -> dict[Text, Tensor]:
    """The base's own logits (n_answer, n_vocab) of each text to keep.

    Of up to `n_tokens` of text at once: a product of few rows with a large head takes about as long as one of many.
    """
    reference: dict[Text, Tensor] = {}
    for _, texts in by_length(base, list(dict.fromkeys(replace(ask, edit=0) for ask in kept)), n_tokens):
        reference.update(zip(texts, base.reference_logits(texts), strict=True))
    return reference


def _kl(logits: Tensor, reference: Sequence[Tensor], weight: float, gradient: Tensor) -> Tensor:
    """KL(base || edited), a mean over each text's positions and a sum over texts; sets its weighed gradient.

    Args:
        logits: the edited model's, (n, n_vocab).
        reference: the base's of each text, in the same order, n rows in all.
        weight: what the gradient, and not the loss, is multiplied by.
        gradient: (n, n_vocab) in the logits' dtype, to be set.
    """
    loss = logits.new_zeros((), dtype=torch.float32)
    if not reference:
        return loss
    lengths = torch.tensor([len(one) for one in reference], device=logits.device)
    weights = (1 / lengths).repeat_interleave(lengths)[:, None]
    of_base = torch.cat(list(reference))
    for part in slices(logits):
        before, after = of_base[part].float().log_softmax(-1), logits[part].float().log_softmax(-1)
        probabilities = before.exp()
        loss += (weights[part] * probabilities * before.sub_(after)).sum()
        gradient[part] = after.exp_().sub_(probabilities).mul_(weights[part] * weight)
    return loss
