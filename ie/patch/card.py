"""The model card of an exported adapter: what it changes, on which base, and what it was seen to do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from ie.base.model import Base
from ie.patch.info import PatchInfo

__all__ = ["model_card"]


def model_card(base: Base, infos: Sequence[PatchInfo], modules: Sequence[str], rank: int) -> str:
    """A README.md as the hub expects it, with its YAML block at the top.

    Args:
        base: the base model.
        infos: the patches that the adapter is made of.
        modules: paths of the modules that it changes.
        rank: its rank.
    """
    edits = [one for info in infos for one in ([parent.info for parent in info.parents] or [info])]
    return "\n".join(_lines(base, edits, modules, rank)) + "\n"


def _lines(base: Base, edits: Sequence[PatchInfo], modules: Sequence[str], rank: int) -> Iterator[str]:
    yield from ("---", f"base_model: {json.dumps(base.id)}", "library_name: peft", "pipeline_tag: text-generation")
    yield from ("tags:", "- lora", "- knowledge-editing", "---", "")
    yield from ("# An edit of what a language model knows" if len(edits) == 1 else f"# {len(edits)} edits", "")
    revision = f", revision `{base.revision}`" if base.revision else ""
    yield f"A LoRA adapter of rank {rank} for `{base.id}`{revision} (weights of fingerprint `{base.fingerprint}`)."
    yield "It holds knowledge edits as low-rank updates of the modules listed below; all other weights are the base's."
    yield from ("", "## What it changes", "", "| prompt | before | wanted | after | took |", "|---|---|---|---|---|")
    for edit in edits:
        took = {True: "yes", False: "no", None: ""}[edit.took]
        yield f"| {' | '.join(map(_cell, (edit.prompt, edit.before, edit.target, edit.after)))} | {took} |"
    probes = [probe for edit in edits for probe in edit.probes]
    if probes:
        yield from ("", "Prompts that should not move:", "", "| prompt | before | after |", "|---|---|---|")
        for probe in probes:
            yield f"| {' | '.join(map(_cell, (probe.prompt, probe.before, probe.after)))} |"
    yield from ("", "Answers are greedy, to the plain prompt; each edit's were asked of its own patch alone.")
    yield from ("", "## Modules", "", *(f"- `{name}`" for name in modules), "", "## Where it comes from", "")
    for edit in edits:
        editor = f"editor {_cell(edit.editor)}" if edit.editor else "an editor unknown"
        made = f"{_cell(edit.created)}, ie {_cell(edit.versions.get('ie'))}"
        yield f"- {_cell(edit.prompt) or 'an imported adapter'}: {editor}, {made}"


def _cell(text: str | None) -> str:
    """A text as it is, in a table's cell: no markup, no line break."""
    if text is None:
        return ""
    flat = " ".join(text.split())
    return "".join(f"\\{char}" if char in "\\`*_[]<>|#" else char for char in flat)
