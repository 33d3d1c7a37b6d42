"""What `ie apply-patch` does: verify patches together on their base, preview answers; stack, merge, export."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ie.base.asking import Ask, answers, matches
from ie.base.load import load_base
from ie.base.model import Base
from ie.base.update import Update
from ie.errors import EditFailedError, InputError, NotEnoughMemoryError, is_out_of_memory
from ie.patch.lowrank import side_by_side, stack
from ie.patch.merge import Merged, merge_checkpoint
from ie.patch.peft import export_peft, padded_rank, read_patch
from ie.patch.stacking import Part, chunks, disturbances, on_base, on_device, split, stacked, without
from ie.servers import check_server

__all__ = ["apply_patch"]

_LEAST_KEPT = 0.5  # of a part's edits that take, or of an update that can't be asked: below, rounding has eaten it


def apply_patch(
    patches: Sequence[Path],
    *,
    model: str | None = None,
    prompts: Sequence[str] = (),
    scale: float | None = None,
    leave_out: Sequence[str] = (),
    out: Path | None = None,
    merge: Path | None = None,
    peft: Path | None = None,
    servers: Sequence[str] = (),
    quant: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """Apply patches together in memory and say what they do; write what is asked for.

    Args:
        patches: patch files, stacks among them, and PEFT LoRA adapter folders.
        model: the base model; None takes the first that a patch names.
        prompts: prompts to answer before and after, beside the patches' own.
        scale: strength, in place of the patches' own.
        leave_out: edits to take out, by the name of their file or by number.
        out: write the edits as one patch.
        merge: write a checkpoint with the edits merged in.
        peft: write a PEFT adapter.
        servers: say of each whether it takes the adapter; see `ie.servers`.
        quant: see `load_base`.
        dtype: see `load_base`; unless `auto` also the dtype of the merged checkpoint.
        device: see `load_base`.
        force: merge although rounding eats an edit.

    Returns:
        The JSON object of `ie apply-patch`.

    Raises:
        InputError: if no patch names a base model, and no model is given, or `merge` or `peft` would replace a folder
            that holds the base or a patch.
        PatchError: if a file is no patch or does not fit the base.
        BaseMismatchError: if a patch was made for another base.
        EditFailedError: if an edit takes, but is lost when merged; nothing is left of the checkpoint.
        NotEnoughMemoryError: if the merged checkpoint, which is asked whole, does not fit the device.
    """
    loaded = [read_patch(path) for path in patches]
    named = model or next((patch.info.base.id for patch in loaded if patch.info.base.id), None)
    if named is None:
        raise InputError("no patch names its base model", hint="give it with --model")
    base = load_base(named, quant=quant, dtype=dtype, device=device)
    for place in filter(None, (merge, peft)):
        _check_replaceable(place, [base.folder, *patches])
    checked = [on_base(patch, base, str(path)) for path, patch in zip(patches, loaded, strict=True)]
    parts = [part for path, patch in zip(patches, checked, strict=True) for part in split(patch, path, scale)]
    parts = without(parts, leave_out)
    update = stack([part.update for part in parts])
    given = _answers(base, parts, update)
    entries = [_entry(part, answered) for part, answered in zip(parts, given, strict=True)]
    known = [entry["took"] for entry in entries if entry["took"] is not None]
    result: dict[str, Any] = {
        "patches": entries,
        "took": all(known) if known else None,
        "disturbed": _disturbed(base, parts, entries),
        "previews": _previews(base, entries, update, prompts),
        "out": None,
        "merged": None,
        "peft": None,
    }
    parts = [_seen(part, answered, len(parts) == 1) for part, answered in zip(parts, given, strict=True)]
    if out is not None:
        made = stacked(parts, base, [entry["took"] for entry in entries])
        result["out"] = {"path": str(out), "bytes": made.save(out), "edits": len(parts)}
    if peft is not None:
        result["peft"] = {"path": str(peft), "rank": export_peft(base, update, peft, [part.info for part in parts])}
    kind, folder = base.model.config.model_type, base.folder  # type: ignore[union-attr]
    rank = padded_rank(update) if servers else 0
    result["checks"] = [check_server(one, str(kind), rank, list(update), str(peft or "ADAPTER")) for one in servers]
    if merge is not None:
        quant, compute = base.quant, str(base.model.dtype).removeprefix("torch.")
        del base  # before the merged model is loaded: never two models in memory
        gc.collect()
        check = _MergeCheck(given, quant, compute, device, force)
        merge_checkpoint(folder, update, merge, dtype=None if dtype == "auto" else dtype, verify=check)
        result["merged"] = {"path": str(merge), **check.found}
    return result


def _check_replaceable(place: Path, inputs: Sequence[Path]) -> None:
    """Refuse a folder to write that holds what is read here: an old one is deleted with all that lies below it."""
    for held in inputs:
        if held.resolve().is_relative_to(place.resolve()):
            raise InputError(f"{place} holds {held}, which it would replace", hint="write to another folder")


@dataclass(frozen=True)
class _Answer:
    """What a question of an edit is answered without and with all edits; whether it is its target with all (`took`),
    and with its own patch alone.
    """

    ask: Ask
    before: str
    after: str
    took: bool
    alone: bool


def _answers(base: Base, parts: Sequence[Part], update: Update) -> list[list[_Answer]]:
    """Of each part the answers to its questions."""
    asks = [ask for part in parts for ask in part.asks]
    before, after = answers(base, asks), answers(base, asks, on_device(base, update))
    took = [matches(new, ask.answer) for ask, new in zip(asks, after, strict=True)]
    alone = _alone(base, parts) if len(parts) > 1 else took
    seen = map(_Answer, asks, before, after, took, alone)
    return [list(islice(seen, len(part.asks))) for part in parts]


def _alone(base: Base, parts: Sequence[Part]) -> list[bool]:
    """Of each of the parts' questions, whether it is answered by its target under its own part."""
    found: list[list[bool]] = [[] for _ in parts]
    asked = [i for i, part in enumerate(parts) if part.asks]
    for places in chunks([parts[i].rank for i in asked]):
        chunk = [asked[place] for place in places]
        update = on_device(base, side_by_side([parts[i].update for i in chunk]))
        asks = [replace(ask, edit=k) for k, i in enumerate(chunk) for ask in parts[i].asks]
        for ask, new in zip(asks, answers(base, asks, update), strict=True):
            found[chunk[ask.edit]].append(matches(new, ask.answer))
    return [took for one in found for took in one]


def _entry(part: Part, answered: Sequence[_Answer]) -> dict[str, Any]:
    """What is said of a part; of a joint patch also what is said of each of its edits."""
    joint = part.info.is_joint
    single = answered[0] if answered and not joint else None
    entry: dict[str, Any] = {
        "patch": str(part.path),
        "name": part.name,
        "prompt": part.info.prompt,
        "target": part.info.target,
        "before": single and single.before,
        "after": single and single.after,
        "took": all(one.took for one in answered) if answered else None,
        "took_alone": all(one.alone for one in answered) if answered else None,
    }
    if joint:
        entry["edits"] = [
            {
                "prompt": one.ask.prompt,
                "target": one.ask.answer,
                "before": one.before,
                "after": one.after,
                "took": one.took,
            }
            for one in answered
        ]
    return entry


def _disturbed(base: Base, parts: Sequence[Part], entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Single edits that take alone and not beside the others, and who disturbs them."""
    which = [i for i, one in enumerate(entries) if "edits" not in one and one["took_alone"] and not one["took"]]
    return [
        {
            "number": one.edit + 1,
            "patch": parts[one.edit].name,
            "prompt": parts[one.edit].info.prompt,
            "by": [parts[j].name for j in one.by],
            "by_numbers": [j + 1 for j in one.by],
            "most_by": parts[one.most_by].name,
        }
        for one in disturbances(base, parts, which)
    ]


def _previews(
    base: Base, entries: Sequence[dict[str, Any]], update: Update, prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """The single edits' own prompts and those given, without and with the edits."""
    asks = [Ask(prompt, "") for prompt in prompts]
    before, after = answers(base, asks), answers(base, asks, on_device(base, update))
    own = [{key: one[key] for key in ("prompt", "before", "after")} for one in entries if one["after"] is not None]
    given = zip(prompts, before, after, strict=True)
    return [*own, *({"prompt": prompt, "before": old, "after": new} for prompt, old, new in given)]


def _seen(part: Part, answered: Sequence[_Answer], alone: bool) -> Part:
    """An edit of another strength than its file's, of which nothing was known, with what was seen of it now."""
    info = part.info
    if info.took is not None or not answered:
        return part

    def seen(one: _Answer) -> dict[str, Any]:
        return {"before": one.before, "after": one.after if alone else None, "took": one.alone}

    if info.is_joint:
        parents = tuple(
            parent.model_copy(update={"took": one.alone, "info": parent.info.model_copy(update=seen(one))})
            for parent, one in zip(info.parents, answered, strict=True)
        )
        changes = {"took": all(one.alone for one in answered), "parents": parents}
    else:
        changes = seen(answered[0])
    return replace(part, info=info.model_copy(update=changes))


class _MergeCheck:
    """Loads what was written and asks it: rounding can eat a small edit.

    Args:
        given: of each part the answers to its questions, as applied.
        quant: of the base that gave them.
        compute: the dtype to compute in, that of the base before.
        device: where to.
        force: let it pass.
    """

    def __init__(self, given: Sequence[Sequence[_Answer]], quant: str, compute: str, device: str, force: bool) -> None:
        self.given, self.quant, self.compute, self.device, self.force = given, quant, compute, device, force
        self.found: dict[str, Any] = {}

    def __call__(self, folder: Path, merged: Merged) -> None:
        asks = [one.ask for part in self.given for one in part]
        after = self._asked(folder, asks)
        took = [matches(new, ask.answer) for ask, new in zip(asks, after, strict=True)]
        seen = zip(took, after, strict=True)
        lost = [self._lost(part, list(islice(seen, len(part)))) for part in self.given]
        self.found = {
            "dtype": merged.dtype,
            "kept": merged.kept,
            "took": all(took) if took else None,
            "answers": after,
            "n_tensors": merged.n_tensors,
        }
        eaten = any(lost) if asks else merged.kept < _LEAST_KEPT
        if eaten and not self.force:
            example = next(filter(None, lost), "")
            whole = "" if self.quant == "none" else f" of a base that was asked in {self.quant} and is whole now"
            raise EditFailedError(
                f"rounding to {merged.dtype} leaves {merged.kept:.0%} of the edit{whole}, and it is lost{example}",
                hint="`--dtype float32` rounds nothing; `--force` writes the checkpoint all the same"
                + ("" if self.quant == "none" else "; `--quant none` without --merge shows what the patch does"),
            )

    def _asked(self, folder: Path, asks: Sequence[Ask]) -> list[str]:
        try:
            return answers(load_base(str(folder), dtype=self.compute, quant="none", device=self.device), asks)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise NotEnoughMemoryError(
                f"out of memory: a merged checkpoint is asked before it is kept, whole and in {self.compute}",
                hint="`--device cpu` asks it in the machine's memory",
            ) from error

    @staticmethod
    def _lost(part: Sequence[_Answer], now: Sequence[tuple[bool, str]]) -> str:
        """An example, where less than half of what took still does: of a single edit that is itself."""
        before = [(one, took, new) for one, (took, new) in zip(part, now, strict=True) if one.took]
        gone = [(one, new) for one, took, new in before if not took]
        if len(before) - len(gone) >= _LEAST_KEPT * len(before):
            return ""
        one, new = gone[0]
        return f": {one.ask.prompt!r} gives {new!r}, expected {one.ask.answer!r}"
