"""Where in a base model an edit can take hold: `python -m benchmarks.locate BASE DATA`.

DATA is a dataset folder. No editor takes part. What a block's MLP puts out at one place of the request (the subject's
last token, or the prompt's last) is moved by gradient descent until the model gives the target, and the move is hung
on the MLP's own input there through the inverse of that input's second moment: ROME's update (arXiv 2202.05262,
section 3.1) as the least squares of the places of one or two contexts, the request alone and behind an instruction.
So a row says how well keys at that place tell a subject from its neighbours, and how far they carry to other wordings.
Test records, plain questions, forced, percent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ie.base import Base, load_base
from ie.base.capture import row_mean
from ie.base.targets import EditTarget
from ie.base.update import Factors
from ie.data.dataset import Dataset
from ie.data.record import Record
from ie.data.templates import instructed
from ie.data.tokens import Text
from ie.evaluation.instructions import heldout_instructions
from ie.evaluation.metrics import mean
from ie.evaluation.protocol import measure
from ie.evaluation.respondent import Respondent

METRICS = ("reliability", "generalization", "locality", "locality-known")
_STEPS, _STEP_SIZE, _LEARNED = 25, 0.3, 0.03  # of Adam; a target's loss for each token at which a record rests
_SHRINKAGE = 0.05  # of the second moment, as a share of its mean diagonal
_N_SEEN = 1500  # training prompts that the second moment is taken over


@dataclass(frozen=True)
class Places:
    """Requests in their contexts, and where each is moved: (n_texts,) int64 positions and the records' numbers."""

    texts: list[Text]
    position: Tensor
    record: Tensor


def places(base: Base, records: Sequence[Record], told: Sequence[str | None], where: str, *, both: bool) -> Places:
    """The requests of records, plain and (with `both`) behind an instruction, with the token to hang an edit on."""
    texts, position, numbers = [], [], []
    for number, (record, instruction) in enumerate(zip(records, told, strict=True)):
        for context in (None, instruction) if both else (None,):
            text = base.encode(record.prompt, record.target, context)
            shown = record.prompt if context is None else instructed(context, record.prompt)
            end = len(shown) - len(record.prompt) + record.prompt.index(record.subject) + len(record.subject)
            spans = base.tokenizer(f"{shown} {record.target}", return_offsets_mapping=True)["offset_mapping"]
            subject = max(k for k, (start, stop) in enumerate(spans) if start < end and stop > start)
            texts.append(text)
            position.append(subject if where == "subject" else text.n_prompt - 1)
            numbers.append(number)
    return Places(texts, torch.tensor(position), torch.tensor(numbers))


def second_moment(base: Base, target: EditTarget, records: Sequence[Record]) -> Tensor:
    """Mean of uuᵀ over the tokens of prompts, (d_in, d_in) float64, shrunk towards its mean diagonal."""
    total, n = torch.zeros(target.d_in, target.d_in, dtype=torch.float64), 0

    def add(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal n
        u = args[0].reshape(-1, target.d_in).double()
        total.add_(u.T @ u)
        n += len(u)

    handle = base.model.get_submodule(target.name).register_forward_pre_hook(add)
    with torch.no_grad():
        for record in records:
            base.logits(base.collate([base.encode(record.prompt, record.target)]))
    handle.remove()
    return total / n + _SHRINKAGE * total.trace() / n / target.d_in * torch.eye(target.d_in, dtype=torch.float64)


def moved(base: Base, target: EditTarget, at: Places) -> tuple[Tensor, Tensor]:
    """What each record's places hold, (n_texts, d_in), and the move there that gives its target, (n, d_out)."""
    batch, n = base.collate(at.texts), int(at.record.max()) + 1
    move = torch.zeros(n, target.d_out, requires_grad=True)
    rows = torch.arange(len(at.texts))
    keys = torch.empty(0)

    def add(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal keys
        keys = args[0][rows, at.position].detach().float()
        return output.index_put((rows, at.position), move[at.record], accumulate=True)

    adam = torch.optim.Adam([move], lr=_STEP_SIZE)
    of_label = at.record[batch.rows]
    handle = base.model.get_submodule(target.name).register_forward_hook(add)
    for _ in range(_STEPS):
        losses = torch.nn.functional.cross_entropy(base.logits(batch), batch.labels, reduction="none")
        unlearned = row_mean(losses.detach(), of_label, n) > _LEARNED
        adam.zero_grad()
        losses[unlearned[of_label]].sum().backward()  # type: ignore[no-untyped-call]
        before = move.detach().clone()
        adam.step()
        move.data = torch.where(unlearned[:, None], move.data, before)  # what is learned rests
    handle.remove()
    return keys, move.detach()


def hung(keys: Tensor, move: Tensor, inverse: Tensor, n_contexts: int) -> Factors:
    """The least update of each record that makes its move at all its keys: A (n, c, d_in) and B (n, c, d_out)."""
    k = keys.double().view(len(move), n_contexts, -1)
    directions = k @ inverse
    gram = directions @ k.mT
    damping = 1e-2 * gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    a = torch.linalg.solve(gram + damping * torch.eye(n_contexts, dtype=gram.dtype), directions)
    return a.float(), move[:, None].expand(-1, n_contexts, -1).contiguous()


def table(base: Base, dataset: Dataset, task: str, limit: int) -> Iterator[str]:
    """A line for each block, place and context."""
    records = [one for one in dataset.records("test", [task]) if one.subject in one.prompt][:limit]
    told = heldout_instructions(records)
    before = Respondent(base)
    outputs = {one.block: one for one in base.targets}  # the last projection of a block's MLP is its output
    yield f"| block | place | contexts | {' | '.join(METRICS)} |"
    yield "|---" * (len(METRICS) + 3) + "|"
    for block, target in outputs.items():
        inverse = torch.linalg.inv(second_moment(base, target, dataset.records("train")[:_N_SEEN]))
        for where in ("subject", "last"):
            for both in (False, True):
                at = places(base, records, told, where, both=both)
                keys, move = moved(base, target, at)
                update = {target.name: hung(keys, move, inverse, 2 if both else 1)}
                figures = {
                    one.metric: mean(list(one.values.values()))
                    for one in measure(base, records, told, update, generate=False, before=before)
                    if one.query == "plain"
                }
                cells = " | ".join(f"{100 * figures[metric]:.1f}" if metric in figures else "-" for metric in METRICS)
                yield f"| {block} | {where} | {'plain, instructed' if both else 'plain'} | {cells} |"


def main() -> None:
    """Print the table, line by line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("data", type=Path)
    parser.add_argument("--task", default="counterfact")
    parser.add_argument("--limit", type=int, default=100, help="test records")
    args = parser.parse_args()
    base = load_base(args.base, dtype="float32", device="cpu", n_blocks=sys.maxsize)
    for line in table(base, Dataset.load(args.data), args.task, args.limit):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
