"""What `ie apply-patch` does: verify patches on their base, preview answers, merge, export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ie.base.asking import Ask, answers, matches
from ie.base.load import load_base
from ie.base.model import Base
from ie.base.plan import resolve_folder
from ie.base.update import Update
from ie.patch.merge import merge_checkpoint
from ie.patch.patch import Patch, applied, check_base, combined
from ie.patch.peft import export_peft

__all__ = ["apply_patch"]


def apply_patch(
    patches: Sequence[Path],
    *,
    model: str | None = None,
    prompts: Sequence[str] = (),
    scale: float | None = None,
    merge: Path | None = None,
    peft: Path | None = None,
    quant: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """Apply patches together in memory and say what they do; write what is asked for.

    Args:
        patches: patch files.
        model: the base model; None takes the one that the first patch names.
        prompts: prompts to answer before and after, beside the patches' own.
        scale: strength, in place of the patches' own.
        merge: write a checkpoint with the edits merged in.
        peft: write a PEFT adapter.
        quant: see `load_base`.
        dtype: see `load_base`.
        device: see `load_base`.
        force: overwrite `merge` and `peft`.

    Returns:
        The JSON object of `ie apply-patch`.

    Raises:
        PatchError: if a file is no patch or does not fit the base.
        BaseMismatchError: if a patch was made for another base.
    """
    loaded = [Patch.load(path) for path in patches]
    base = load_base(model or loaded[0].info.base.id, quant=quant, dtype=dtype, device=device)
    for path, patch in zip(patches, loaded, strict=True):
        check_base(patch, base, path)
    with applied(base, *loaded, scale=scale):
        pass  # all modules and shapes are checked before anything is computed or written
    update = {name: (a.to(base.device), b.to(base.device)) for name, (a, b) in combined(loaded, scale).items()}
    own = [Ask(patch.info.prompt, patch.info.target) for patch in loaded]
    previews = [*own, *(Ask(prompt, "") for prompt in prompts)]
    before, after = answers(base, previews), answers(base, previews, update)
    took = [matches(answer, ask.answer) for answer, ask in zip(after, own, strict=False)]
    return {
        "patches": [
            {"patch": str(path), "prompt": ask.prompt, "target": ask.answer, "took": good}
            for path, ask, good in zip(patches, own, took, strict=True)
        ],
        "took": all(took),
        "previews": [
            {"prompt": ask.prompt, "before": old, "after": new}
            for ask, old, new in zip(previews, before, after, strict=True)
        ],
        "merged": None if merge is None else _merged(base, update, own, merge),
        "peft": None if peft is None else {"path": str(peft), "rank": export_peft(base, update, peft)},
    }


def _merged(base: Base, update: Update, own: Sequence[Ask], out: Path) -> dict[str, Any]:
    """Merge, load what was written, and ask it: rounding can eat a small edit."""
    merge_checkpoint(base, resolve_folder(base.id), update, out)
    merged = load_base(str(out), dtype=str(base.model.dtype).removeprefix("torch."), quant="none")
    found = answers(merged, own)
    return {
        "path": str(out),
        "took": all(matches(answer, ask.answer) for answer, ask in zip(found, own, strict=True)),
        "answers": found,
    }
