"""Patches on a loaded model: nested, for some rows, in threads; the base bit for bit afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ie.base import Base
from ie.errors import BaseMismatchError, IEError, PatchError
from ie.patch import applied
from ie.patch.info import PatchBase
from tests.dense import state_hash
from tests.models import ARCHITECTURES
from tests.patch.test_patch import logits_of, make

BOTH_ROWS = ("gpt2", "llama", "opt")  # OPT flattens rows and tokens before its MLP


@pytest.mark.parametrize("quant", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("name", BOTH_ROWS)
def test_a_patch_for_some_rows(load: Callable[..., Base], name: str, quant: str) -> None:
    base = load(name, quant)
    patch, state = make(base), state_hash(base.model)
    plain = logits_of(base)
    with applied(base, patch):
        edited = logits_of(base)
    with applied(base, patch, rows=[True, False, False]):
        first = logits_of(base)
    # Rows are products of their own in a batch: another order of the same float32 sums.
    torch.testing.assert_close(first[0], edited[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(first[1:], plain[1:])
    assert not torch.equal(first[0], plain[0])
    assert torch.equal(logits_of(base), plain) and state_hash(base.model) == state


def test_another_base_is_refused_where_it_is_known(load: Callable[..., Base]) -> None:
    base = load("llama")
    patch = make(base)
    of_another = replace(
        patch, info=patch.info.model_copy(update={"base": PatchBase(id="other", fingerprint="0" * 16)})
    )
    with pytest.raises(BaseMismatchError, match="was made for other"), applied(base, patch, of_another):
        pass
    with applied(base.model, of_another):  # of a bare model nothing is known but its modules
        assert logits_of(base).isfinite().all()


def test_each_row_under_its_own_patch(load: Callable[..., Base]) -> None:
    base = load("llama")
    one, two = make(base, seed=1), make(base, seed=2)
    plain, found = logits_of(base), []
    for patch in (one, two):
        with applied(base, patch):
            found.append(logits_of(base))
    with applied(base, one, rows=[True, False, False]), applied(base, two, rows=[False, True, False]):
        both = logits_of(base)
    torch.testing.assert_close(both[0], found[0][0], atol=1e-5, rtol=1e-5)  # as above
    torch.testing.assert_close(both[1], found[1][1], atol=1e-5, rtol=1e-5)
    assert torch.equal(both[2], plain[2])


@pytest.mark.parametrize("n_beams", [1, 3])
def test_rows_under_generate(load: Callable[..., Base], n_beams: int) -> None:
    base = load("llama")
    batch = base.collate([base.encode("The lighthouse of Orm was built by")] * 2)

    def generate() -> Tensor:
        out: Tensor = base.model.generate(  # type: ignore[operator]
            input_ids=batch.ids, max_new_tokens=6, num_beams=n_beams, do_sample=False, pad_token_id=base.pad_id
        )
        return out

    plain = generate()
    with applied(base, make(base, size=0.5)):
        edited = generate()
    with applied(base, make(base, size=0.5), rows=[False, True]):
        mixed = generate()
    assert not torch.equal(plain, edited)
    assert torch.equal(mixed[0], plain[0]) and torch.equal(mixed[1], edited[1])


def test_rows_that_do_not_fit_the_batch(load: Callable[..., Base]) -> None:
    base = load("llama")
    before = logits_of(base)
    with pytest.raises(PatchError, match="a batch of 3 rows, expected 2"), applied(base, make(base), rows=[True] * 2):
        logits_of(base)
    with pytest.raises(PatchError, match="found none"), applied(base, make(base), rows=[]):
        pass
    assert torch.equal(logits_of(base), before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nested_contexts_add_up_and_leave_nothing(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    before = logits_of(base)
    one, two = make(base, seed=1, size=0.02), make(base, seed=2, size=0.02)
    with applied(base, one):
        alone = logits_of(base)
        with pytest.raises(RuntimeError, match="stop"), applied(base.model, two):
            nested = logits_of(base)
            raise RuntimeError("stop")
        assert torch.equal(logits_of(base), alone)  # the inner one is gone, the outer one still there
    with applied(base, one, two):
        torch.testing.assert_close(logits_of(base), nested, atol=1e-5, rtol=1e-5)  # the order of a float32 sum
    assert torch.equal(logits_of(base), before)


def test_other_threads_are_refused_until_it_is_left(load: Callable[..., Base]) -> None:
    base = load("llama")
    before = logits_of(base)
    seen: list[object] = []

    def in_a_thread(work: Callable[[], object]) -> None:
        def catch() -> None:
            try:
                seen.append(work())
            except IEError as error:
                seen.append(error)

        thread = threading.Thread(target=catch)
        thread.start()
        thread.join()

    def apply() -> Tensor:
        with applied(base, make(base, seed=2)):
            return logits_of(base)

    with applied(base, make(base)):
        in_a_thread(lambda: logits_of(base))  # would silently get this thread's edit
        in_a_thread(apply)
    assert [str(error) for error in seen] == ["this model is under a patch in another thread"] * 2
    in_a_thread(lambda: logits_of(base))
    in_a_thread(apply)
    assert torch.equal(seen[2], before) and not torch.equal(seen[3], before)  # type: ignore[arg-type]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.model.modules())
