"""Patches on a loaded model: a context in which it computes as edited, and after which it is the base, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ie.base.model import Base
from ie.base.targets import module_shape
from ie.base.update import Factors, Update, adding
from ie.errors import BaseMismatchError, IEError, PatchError
from ie.patch.lowrank import stack
from ie.patch.patch import Patch

__all__ = ["applied", "check_base", "check_modules", "combined"]

_owners: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()  # threads inside `applied`, one entry a context
_lock = threading.Lock()


@contextmanager
def applied(
    model: nn.Module | Base, *patches: Patch, scale: float | None = None, rows: Sequence[bool] | None = None
) -> Iterator[None]:
    """Let a model compute as edited by some patches while the context lasts; its weights are not changed.

    Contexts nest, on the same model too: their changes add up. A model that is under a patch in one thread is refused
    to all others until that thread has left, since they would silently get its edits.

    Args:
        model: a loaded causal LM, quantised or not, or a `Base`.
        patches: what to apply, together.
        scale: strength, in place of the patches' own.
        rows: which rows of a batch the patches are switched on for; None for all. Every batch in the context must have
            `len(rows)` rows, or a multiple, as beam search makes it: each row's beams in a block.

    Raises:
        BaseMismatchError: if a `Base` is not the one that a patch was made for; of a bare model that isn't known.
        PatchError: if the model lacks a module of a patch, or the module has another shape (all are named), or if a
            batch does not fit `rows`.
        IEError: if the model is in use under a patch in another thread.
    """
    module = model.model if isinstance(model, Base) else model
    if isinstance(model, Base):
        for patch in patches:
            check_base(patch, model, "given")
    check_modules(module, patches)
    update = _placed(module, combined(patches, scale))
    which = None
    if rows is not None:
        if not rows:
            raise PatchError("rows: expected one true or false for each row of a batch, found none")
        update = {name: (_beside_nothing(a), _beside_nothing(b)) for name, (a, b) in update.items()}
        which = torch.tensor([bool(on) for on in rows]).long()
    with _owned(module), _guarded(module, update, None if rows is None else len(rows)), ExitStack() as entered:
        for name, (a, b) in update.items():  # one by one: modules, and so their rows, may lie on several devices
            entered.enter_context(adding(module, {name: (a, b)}, None if which is None else which.to(a.device)))
        yield


def combined(patches: Sequence[Patch], scale: float | None = None) -> dict[str, Factors]:
    """The sum of some patches as one low-rank update."""
    return stack([patch.update(scale) for patch in patches])


def check_base(patch: Patch, base: Base, path: Path | str) -> None:
    """Refuse a base model that the patch was not made for; an imported adapter was made for any.

    Raises:
        BaseMismatchError: if its fingerprint is another one; it says whether the modules fit.
    """
    made_for = patch.info.base
    if made_for.fingerprint and made_for.fingerprint != base.fingerprint:
        faults = list(_misfits(base.model, patch))
        what = "; ".join(faults) if faults else "all modules of the patch are there, so it is the weights that differ"
        raise BaseMismatchError(
            f"the patch {path} was made for {made_for.id} (fingerprint {made_for.fingerprint}), "
            f"this base is {base.id} ({base.fingerprint}): {what}",
            hint="give the patch's base with --model, or make the edit again for this one",
        )


def check_modules(model: nn.Module, patches: Sequence[Patch]) -> None:
    """Refuse patches that do not fit a model's modules.

    Raises:
        PatchError: naming all faults.
    """
    faults = [fault for patch in patches for fault in _misfits(model, patch)]
    if faults:
        raise PatchError(f"the patch does not fit {type(model).__name__}: {'; '.join(dict.fromkeys(faults))}")


def _misfits(model: nn.Module, patch: Patch) -> Iterator[str]:
    modules = dict(model.named_modules())
    for name, (a, b) in patch.factors.items():
        if name not in modules:
            yield f"no module {name}"
        elif module_shape(modules[name]) != (a.shape[1], b.shape[1]):
            yield f"{name} maps {module_shape(modules[name])}, the patch {(a.shape[1], b.shape[1])}"


def _placed(model: nn.Module, update: Update) -> dict[str, Factors]:
    """An update with its factors where their modules are: a model may be spread over several devices."""
    placed = {}
    for name, (a, b) in update.items():
        device = next(model.get_submodule(name).parameters()).device
        placed[name] = (a.to(device), b.to(device))
    return placed


def _beside_nothing(factor: Tensor) -> Tensor:
    """Two edits of one: the first changes nothing."""
    return torch.cat((torch.zeros_like(factor), factor))


@contextmanager
def _owned(model: nn.Module) -> Iterator[None]:
    """Keep other threads from putting their patches on the same model."""
    me = threading.get_ident()
    with _lock:
        owners = _owners.setdefault(model, [])
        if any(owner != me for owner in owners):
            raise _in_use()
        owners.append(me)
    try:
        yield
    finally:
        with _lock:
            owners.remove(me)


@contextmanager
def _guarded(model: nn.Module, update: Update, n_rows: int | None) -> Iterator[None]:
    """Refuse, at each edited module, other threads and batches of another size."""
    me = threading.get_ident()

    def check(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if threading.get_ident() != me:
            raise _in_use()
        # OPT flattens (rows, tokens) before its MLP, so only the product can be checked there.
        if n_rows is not None and args[0].shape[0] % n_rows:
            raise PatchError(f"a batch of {args[0].shape[0]} rows, expected {n_rows} as in `rows`, or a multiple")

    handles = [model.get_submodule(name).register_forward_pre_hook(check) for name in update]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_use() -> IEError:
    return IEError(
        "this model is under a patch in another thread",
        hint="enter `applied` in the thread that runs the model, one thread at a time, or load a model for each",
    )
