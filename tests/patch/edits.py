"""Patches that take, on a tiny model with random weights: gradient descent is enough for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from ie.base import Base
from ie.editor.methods import finetune_method
from ie.editor.request import EditRequest
from ie.patch import Patch
from tests.patch.test_patch import make

__all__ = ["PROMPT", "TAKES_ON", "TARGET", "taking"]

TAKES_ON = "llama-tied"
PROMPT, TARGET = "The lighthouse of Orm was built by", "Edda"


@cache
def _factors(load: Callable[..., Base]) -> Patch:
    base = load(TAKES_ON)
    update = finetune_method(0.4)(base, [EditRequest(PROMPT, TARGET)])
    info = make(base).info.model_copy(update={"prompt": PROMPT, "target": TARGET})
    return Patch(info, {name: (a[0].detach(), b[0].detach()) for name, (a, b) in update.items()})


def taking(load: Callable[..., Base], scale: float = 1.0) -> Patch:
    """A patch of the base `TAKES_ON` after which it answers `PROMPT` with `TARGET` and stops."""
    patch = _factors(load)
    return replace(patch, info=patch.info.model_copy(update={"scale": scale}))
