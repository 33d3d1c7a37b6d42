"""Stacks: several edits as one low-rank sum, from which each can be taken out again exactly.

The rows of a stack's factors are its edits' rows, one block after the other, never mixed or compressed together. So
taking an edit out is leaving its rows out, and what remains is, bit for bit, the stack of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ie.base.asking import Ask, answers, log_likelihoods, matches
from ie.base.model import Base
from ie.base.update import Factors, Update
from ie.errors import InputError
from ie.patch.info import Parent, PatchBase, PatchInfo
from ie.patch.live import check_base, check_modules
from ie.patch.lowrank import side_by_side, stack
from ie.patch.patch import DTYPES, Patch
from ie.versions import now, versions

__all__ = ["Disturbance", "Part", "chunks", "disturbances", "on_base", "on_device", "split", "stacked", "without"]

_MAX_SIDE_BY_SIDE, _MAX_ROWS = 32, 4096  # edits that are asked at once, and rows of a factor, padding counted


@dataclass(frozen=True)
class Part:
    """One edit among those that are applied together.

    Attributes:
        path: where it was read from.
        name: the name of its own file, which in a stack is not that of `path`.
        info: its document; `scale` is the strength it has here.
        factors: by module path A (r, d_in) and B (r, d_out), float32, the strength multiplied in.
        dtype: of its factors in its own file.
    """

    path: Path
    name: str
    info: PatchInfo
    factors: Mapping[str, tuple[Tensor, Tensor]]
    dtype: str

    @property
    def update(self) -> dict[str, Factors]:
        """The low-rank update, a batch of one."""
        return {name: (a[None], b[None]) for name, (a, b) in self.factors.items()}

    @property
    def rank(self) -> int:
        """Its largest, of all modules."""
        return max((len(a) for a, _ in self.factors.values()), default=0)

    @property
    def asks(self) -> list[Ask]:
        """The questions that show whether it takes: one, a joint patch's many, or an imported adapter's none."""
        told = [parent.info for parent in self.info.parents] or [self.info]
        return [Ask(one.prompt, one.target) for one in told if one.prompt is not None and one.target is not None]


@dataclass(frozen=True)
class Disturbance:
    """An edit that takes alone but not beside the others.

    Attributes:
        edit: its index.
        by: those beside each of which, alone, it does not take; empty if it takes beside any one.
        most_by: the one that lowers its target's likelihood most.
    """

    edit: int
    by: tuple[int, ...]
    most_by: int


def on_base(patch: Patch, base: Base, name: str) -> Patch:
    """A patch checked against the base that it will be applied to; an imported adapter's document gets that base.

    Raises:
        BaseMismatchError: if the patch was made for another base.
        PatchError: if the base's modules are others.
    """
    check_base(patch, base, name)
    check_modules(base.model, [patch])
    if patch.info.base.fingerprint:
        return patch
    own = PatchBase(id=base.id, fingerprint=base.fingerprint, revision=base.revision)
    return replace(patch, info=patch.info.model_copy(update={"base": own}))


def split(patch: Patch, path: Path, scale: float | None = None) -> list[Part]:
    """The edits of a patch: itself, also where it is a joint one, or those of a stack.

    Args:
        patch: the patch.
        path: where it was read from.
        scale: strength, in place of the patch's own.
    """
    factor = patch.info.scale if scale is None else scale
    patch = patch if factor == patch.info.scale else replace(patch, info=_unseen(patch.info))
    if not patch.info.parents or patch.info.is_joint:
        info = patch.info.model_copy(update={"scale": factor})
        factors = {key: (a, factor * b) for key, (a, b) in patch.factors.items()}
        return [Part(path, path.name, info, factors, patch.dtype)]
    parts, begin = [], dict.fromkeys(patch.factors, 0)
    for parent in patch.info.parents:
        factors = {}
        for key, rank in parent.ranks.items():
            rows = slice(begin[key], begin[key] + rank)
            a, b = patch.factors[key]
            factors[key] = (a[rows], factor * b[rows])
            begin[key] += rank
        info = parent.info.model_copy(update={"scale": parent.info.scale * factor})
        parts.append(Part(path, parent.name, info, factors, parent.dtype))
    return parts


def _unseen(info: PatchInfo) -> PatchInfo:
    """The document of the same edits at another strength: what they do there is not known."""
    parents = (one.model_copy(update={"took": None, "info": _unseen(one.info)}) for one in info.parents)
    return info.model_copy(update={"after": None, "took": None, "probes": (), "parents": tuple(parents)})


def without(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """The edits that are left when some are taken out.

    Args:
        parts: edits.
        names: which to take out, by name, or by number from 1.

    Raises:
        InputError: if a name is unknown or stands for several edits, or if no edit is left.
    """
    gone = set()
    for name in names:
        found = [i for i, part in enumerate(parts) if part.name == name]
        if not found and name.isdecimal() and 1 <= int(name) <= len(parts):
            found = [int(name) - 1]
        if len(found) != 1:
            known = ", ".join(f"{i} {part.name}" for i, part in enumerate(parts, 1))
            what = "names several edits" if found else "names no edit"
            raise InputError(f"--without {name}: {what}, expected a number or name of: {known}")
        gone.add(found[0])
    if names and len(gone) == len(parts):
        raise InputError(f"--without {', '.join(names)}: no edit is left")
    return [part for i, part in enumerate(parts) if i not in gone]


def stacked(parts: Sequence[Part], base: Base, took: Sequence[bool | None]) -> Patch:
    """Edits as one patch, with their documents inside; a single edit is a plain patch again.

    Args:
        parts: edits, at least one.
        base: the base model.
        took: whether each takes under the stack.
    """
    factors = {name: (a[0], b[0]) for name, (a, b) in stack([part.update for part in parts]).items()}
    dtype = _exact_dtype(parts, factors)
    if len(parts) == 1:
        return Patch(parts[0].info.model_copy(update={"scale": 1.0}), factors, dtype)
    known = [one for one in took if one is not None]
    editors = {part.info.editor for part in parts}
    info = PatchInfo(
        base=PatchBase(id=base.id, fingerprint=base.fingerprint, revision=base.revision),
        editor=editors.pop() if len(editors) == 1 else None,
        instruction=None,
        prompt=None,
        target=None,
        before=None,
        after=None,
        took=all(known) if known else None,
        created=now(),
        versions=versions(),
        parents=tuple(
            Parent(
                name=part.name,
                dtype=part.dtype,
                ranks={key: len(a) for key, (a, _) in part.factors.items()},
                took=one,
                info=part.info,
            )
            for part, one in zip(parts, took, strict=True)
        ),
    )
    return Patch(info, factors, dtype)


def _exact_dtype(parts: Sequence[Part], factors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """The edits' own dtype if it holds all values exactly, else float32: a stack rounds nothing."""
    dtypes = {part.dtype for part in parts}
    if len(dtypes) == 1:
        dtype = DTYPES[next(iter(dtypes))]
        if all(torch.equal(one, one.to(dtype).float()) for pair in factors.values() for one in pair):
            return next(iter(dtypes))
    return "float32"


def chunks(ranks: Sequence[int]) -> Iterator[list[int]]:
    """Indices of updates that are to be held side by side, each padded to the largest rank among them."""
    chunk: list[int] = []
    for i in sorted(range(len(ranks)), key=ranks.__getitem__):
        if chunk and (len(chunk) == _MAX_SIDE_BY_SIDE or (len(chunk) + 1) * ranks[i] > _MAX_ROWS):
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def disturbances(base: Base, parts: Sequence[Part], disturbed: Sequence[int]) -> list[Disturbance]:
    """Which edits disturb some that take alone but not in company.

    Each disturbed edit is asked again beside every other one alone: pairs in which it does not take are named. Where
    there is none, only the company as a whole is too much.

    Args:
        base: the base model.
        parts: all edits.
        disturbed: indices of the edits in question; each has one question.

    Returns:
        One for each of `disturbed`.
    """
    pairs = [(i, j) for i in disturbed for j in range(len(parts)) if j != i]
    took: dict[tuple[int, int], bool] = {}
    likelihood: dict[tuple[int, int], float] = {}
    for places in chunks([parts[i].rank + parts[j].rank for i, j in pairs]):
        chunk = [pairs[place] for place in places]
        update = on_device(base, side_by_side([stack([parts[i].update, parts[j].update]) for i, j in chunk]))
        asks = [replace(parts[i].asks[0], edit=k) for k, (i, _) in enumerate(chunk)]
        for pair, ask, answer in zip(chunk, asks, answers(base, asks, update), strict=True):
            took[pair] = matches(answer, ask.answer)
        likelihood |= dict(zip(chunk, log_likelihoods(base, asks, update), strict=True))
    found = []
    for i in disturbed:
        others = [j for j in range(len(parts)) if j != i]
        enough = tuple(j for j in others if not took[i, j])
        found.append(Disturbance(i, enough, min(others, key=lambda j: likelihood[i, j])))
    return found


def on_device(base: Base, update: Update) -> dict[str, Factors]:
    """An update where the base's inputs go."""
    return {name: (a.to(base.device), b.to(base.device)) for name, (a, b) in update.items()}
