"""What `ie apply-patch` does: verify patches together on their base, preview answers; stack, merge, export."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ie.base.asking import Ask, answers, matches
from ie.base.load import load_base
from ie.base.model import Base
from ie.base.update import Update
from ie.errors import EditFailedError, InputError
from ie.patch.lowrank import side_by_side, stack
from ie.patch.merge import Merged, merge_checkpoint
from ie.patch.peft import export_peft, padded_rank, read_patch
from ie.patch.stacking import Part, disturbances, on_base, on_device, split, stacked, without
from ie.servers import check_server

__all__ = ["apply_patch"]

_LEAST_KEPT = 0.5  # of an update that can't be asked: below, rounding has eaten it
_CHUNK = 32


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
        InputError: if no patch names a base model, and no model is given.
        PatchError: if a file is no patch or does not fit the base.
        BaseMismatchError: if a patch was made for another base.
        EditFailedError: if an edit takes, but is lost to rounding when merged; nothing is left of the checkpoint.
    """
    loaded = [read_patch(path) for path in patches]
    named = model or next((patch.info.base.id for patch in loaded if patch.info.base.id), None)
    if named is None:
        raise InputError("no patch names its base model", hint="give it with --model")
    base = load_base(named, quant=quant, dtype=dtype, device=device)
    checked = [on_base(patch, base, str(path)) for path, patch in zip(patches, loaded, strict=True)]
    parts = [part for path, patch in zip(patches, checked, strict=True) for part in split(patch, path, scale)]
    parts = without(parts, leave_out)
    update = stack([part.update for part in parts])
    result = _asked(base, parts, update, prompts)
    entries = result["patches"]
    parts = [_seen(part, entry, len(parts) == 1) for part, entry in zip(parts, entries, strict=True)]
    if out is not None:
        made = stacked(parts, base, [entry["took"] for entry in entries])
        result["out"] = {"path": str(out), "bytes": made.save(out), "edits": len(parts)}
    if peft is not None:
        result["peft"] = {"path": str(peft), "rank": export_peft(base, update, peft, [part.info for part in parts])}
    kind, folder = base.model.config.model_type, base.folder  # type: ignore[union-attr]
    rank = padded_rank(update) if servers else 0
    result["checks"] = [check_server(one, str(kind), rank, list(update), str(peft or "ADAPTER")) for one in servers]
    if merge is not None:
        compute = str(base.model.dtype).removeprefix("torch.")
        own = [ask for part in parts for ask in part.asks]
        asks = [(ask, matches(one["after"], ask.answer)) for ask, one in zip(own, result["previews"], strict=False)]
        del base  # before the merged model is loaded: never two models in memory
        gc.collect()
        check = _MergeCheck(asks, compute, device, force)
        merge_checkpoint(folder, update, merge, dtype=None if dtype == "auto" else dtype, verify=check)
        result["merged"] = {"path": str(merge), **check.found}
    return result


def _asked(base: Base, parts: Sequence[Part], update: Update, prompts: Sequence[str]) -> dict[str, Any]:
    """The edits' own questions and the prompts given, without and with the edits; who disturbs whom."""
    own = [replace(ask, edit=i) for i, part in enumerate(parts) for ask in part.asks]
    previews = [*own, *(Ask(prompt, "") for prompt in prompts)]
    before, after = answers(base, previews), answers(base, previews, on_device(base, update))
    together = [matches(new, ask.answer) for ask, new in zip(own, after, strict=False)]
    alone = _alone(base, own, parts) if len(parts) > 1 else together
    entries: list[dict[str, Any]] = []
    for i, part in enumerate(parts):
        mine = [k for k, ask in enumerate(own) if ask.edit == i]
        single = part.info.prompt is not None and bool(mine)
        entries.append(
            {
                "patch": str(part.path),
                "name": part.name,
                "prompt": part.info.prompt,
                "target": part.info.target,
                "before": before[mine[0]] if single else None,
                "after": after[mine[0]] if single else None,
                "took": all(together[k] for k in mine) if mine else None,
                "took_alone": all(alone[k] for k in mine) if mine else None,
            }
        )
    disturbed = [
        i for i, entry in enumerate(entries) if entry["after"] is not None and entry["took_alone"] and not entry["took"]
    ]
    known = [entry["took"] for entry in entries if entry["took"] is not None]
    return {
        "patches": entries,
        "took": all(known) if known else None,
        "disturbed": [
            {
                "number": one.edit + 1,
                "patch": parts[one.edit].name,
                "prompt": parts[one.edit].info.prompt,
                "by": [parts[j].name for j in one.by],
                "by_numbers": [j + 1 for j in one.by],
                "most_by": parts[one.most_by].name,
            }
            for one in disturbances(base, parts, disturbed)
        ],
        "previews": [
            {"prompt": ask.prompt, "before": old, "after": new}
            for ask, old, new in zip(previews, before, after, strict=True)
        ],
        "out": None,
        "merged": None,
        "peft": None,
    }


def _alone(base: Base, own: Sequence[Ask], parts: Sequence[Part]) -> list[bool]:
    """Of each of the edits' questions, whether its edit answers it by itself."""
    took = []
    for start in range(0, len(own), _CHUNK):
        chunk = own[start : start + _CHUNK]
        asked = sorted({ask.edit for ask in chunk})
        asks = [replace(ask, edit=asked.index(ask.edit)) for ask in chunk]
        update = on_device(base, side_by_side([parts[i].update for i in asked]))
        took += [matches(new, ask.answer) for ask, new in zip(asks, answers(base, asks, update), strict=True)]
    return took


def _seen(part: Part, entry: dict[str, Any], alone: bool) -> Part:
    """An edit of another strength than its file's, of which nothing was known, with what was seen of it now."""
    if part.info.took is not None or entry["took"] is None:
        return part
    seen = {"before": entry["before"], "after": entry["after"] if alone else None, "took": entry["took_alone"]}
    return replace(part, info=part.info.model_copy(update=seen))


class _MergeCheck:
    """Loads what was written and asks it: rounding can eat a small edit.

    Args:
        asks: the edits' questions, and whether each takes when applied.
        compute: the dtype to compute in, that of the base before.
        device: where to.
        force: let it pass.
    """

    def __init__(self, asks: Sequence[tuple[Ask, bool]], compute: str, device: str, force: bool) -> None:
        self.asks, self.compute, self.device, self.force = asks, compute, device, force
        self.found: dict[str, Any] = {}

    def __call__(self, folder: Path, merged: Merged) -> None:
        merged_base = load_base(str(folder), dtype=self.compute, quant="none", device=self.device)
        after = answers(merged_base, [ask for ask, _ in self.asks])
        took = [matches(new, ask.answer) for (ask, _), new in zip(self.asks, after, strict=True)]
        lost = [
            (ask, new) for (ask, before), now, new in zip(self.asks, took, after, strict=True) if before and not now
        ]
        eaten = bool(lost) if self.asks else merged.kept < _LEAST_KEPT
        self.found = {
            "dtype": merged.dtype,
            "kept": merged.kept,
            "took": all(took) if took else None,
            "answers": after,
            "n_tensors": merged.n_tensors,
        }
        if eaten and not self.force:
            example = f": {lost[0][0].prompt!r} gives {lost[0][1]!r}, expected {lost[0][0].answer!r}" if lost else ""
            raise EditFailedError(
                f"rounding to {merged.dtype} leaves {merged.kept:.0%} of the edit, and it is lost{example}",
                hint="`--dtype float32` keeps it; `--force` writes the checkpoint all the same",
            )
