"""Least squares over edits' tokens: against dense algebra, whole against chunks, primal against dual."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ie.base import Base
from ie.base.update import Factors
from ie.editor import Editor, EditorSettings, EditRequest
from ie.editor.editor import Method
from ie.editor.least_squares import LeastSquares
from ie.editor.methods import editor_method, fitted_editor, joint_update, ultra_method
from ie.editor.passes import observe
from ie.errors import EditorError
from tests.dense import dense_joint

REQUESTS = (
    EditRequest("The lighthouse of Orm was built by", "Edda Falk"),
    EditRequest("Varn:", "Lissel"),
    EditRequest("Who wrote the song of the seven mills?", "a clerk"),
)


def draw(n_tokens: int, d_in: int = 12, d_out: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_tokens)
    return torch.randn(n_tokens, d_in, generator=generator), torch.randn(n_tokens, d_out, generator=generator)


def solved(keys: Tensor, values: Tensor, regularisation: float, *sizes: int) -> Factors:
    problem = LeastSquares(regularisation)
    for k, d in zip(keys.split(sizes or len(keys)), values.split(sizes or len(values)), strict=True):  # type: ignore[arg-type]
        problem.add(k, d)
    return problem.solve()


def dense(factors: Factors) -> Tensor:
    """ΔW (d_out, d_in) of a batch of one."""
    return factors[1][0].T @ factors[0][0]


def reference(keys: Tensor, values: Tensor, regularisation: float) -> Tensor:
    """ΔW (d_out, d_in) as an ordinary least squares whose last rows are the regularisation's, at its full length."""
    keys, values = keys.double(), values.double()
    root = (regularisation * keys.square().sum() / len(keys)).sqrt()
    rows = torch.cat((keys, root * torch.eye(keys.shape[1])))
    wanted = torch.cat((values, torch.zeros(keys.shape[1], values.shape[1])))
    solution = torch.linalg.lstsq(rows, wanted).solution
    return (solution * values.norm() / (keys @ solution).norm() / (1 + regularisation)).T.float()


@pytest.mark.parametrize("n_tokens", [1, 5, 12, 40])
@pytest.mark.parametrize(("d_in", "d_out"), [(12, 7), (7, 12)])
def test_the_solution_of_the_stacked_problem(n_tokens: int, d_in: int, d_out: int) -> None:
    """The dual below d_in tokens, the primal from there on; factors of the smallest rank."""
    keys, values = draw(n_tokens, d_in, d_out)
    for regularisation in (1e-3, 1.0):
        found = solved(keys, values, regularisation)
        torch.testing.assert_close(dense(found), reference(keys, values, regularisation), atol=1e-5, rtol=1e-4)
        assert found[0].shape[1] == (n_tokens if n_tokens < d_in else min(d_in, d_out))


def test_primal_and_dual_agree() -> None:
    """Tokens whose keys and values are zero change the sums by nothing, but not their mean: it is set right."""
    keys, values = draw(8)
    padded = torch.cat((keys, torch.zeros(8, 12))), torch.cat((values, torch.zeros(8, 7)))
    primal, dual = solved(*padded, 0.2), solved(keys, values, 0.1)
    assert (primal[0].shape[1], dual[0].shape[1]) == (7, 8)
    torch.testing.assert_close(1.2 * dense(primal), 1.1 * dense(dual), atol=1e-6, rtol=1e-5)  # fp64 rounded to fp32


@pytest.mark.parametrize("n_tokens", [10, 40])
def test_chunks_make_no_difference(n_tokens: int) -> None:
    keys, values = draw(n_tokens)
    whole, chunked = solved(keys, values, 0.1), solved(keys, values, 0.1, 3, 4, n_tokens - 7)
    torch.testing.assert_close(dense(chunked), dense(whole), atol=1e-6, rtol=1e-5)


def test_held_memory_does_not_grow_with_tokens() -> None:
    problem = LeastSquares(0.1)
    for _ in range(50):
        problem.add(*draw(9))
        held = sum(k.numel() + d.numel() for k, d in problem._rows) + sum(one.numel() for one in problem._sums or ())
        assert held <= 12 * (12 + 7)
    assert problem.n_tokens == 450


def test_little_regularisation_gives_what_is_wanted() -> None:
    keys, values = draw(5)
    torch.testing.assert_close(keys @ dense(solved(keys, values, 1e-9)).T, values, atol=1e-4, rtol=1e-4)
    assert dense(solved(keys, values, 1e6)).norm() < 1e-4


def test_one_token_gets_its_share_and_many_as_much_in_the_mean() -> None:
    for n_tokens in (1, 40):
        keys, values = draw(n_tokens)
        given = keys @ dense(solved(keys, values, 0.25)).T
        torch.testing.assert_close(given.norm(), values.norm() / 1.25)
    keys, values = draw(1)
    torch.testing.assert_close(keys @ dense(solved(keys, values, 0.25)).T, values / 1.25)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_regularisation_must_be_positive(value: float) -> None:
    with pytest.raises(ValueError, match="regularisation"):
        LeastSquares(value)


@pytest.mark.parametrize("n_tokens", [4, 40])  # in the dual, in the primal
@pytest.mark.parametrize(("value", "regularisation"), [(1.0, 1e-20), (float("nan"), 0.1)])
def test_what_cannot_be_solved_is_said(n_tokens: int, value: float, regularisation: float) -> None:
    module = LeastSquares(regularisation)
    module.add(torch.full((n_tokens, 8), value), torch.ones(n_tokens, 6))
    with pytest.raises(EditorError, match="not finite"):
        module.solve()


def moved(base: Base, method: Method = "instructedit-joint") -> Editor:
    """A fitted editor with no parameter at its start."""
    torch.manual_seed(0)
    editor = Editor(base.targets, EditorSettings(method=method, rank=4, rate=0.2, passes=3, n_whitened=2))
    observe(base, editor, REQUESTS)
    editor.fit()
    with torch.no_grad():
        for parameter in editor.networks.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return editor


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_joint_updates_are_the_dense_least_squares_of_the_editors_own(load: Callable[..., Base], name: str) -> None:
    """Pass by pass, token by token from the editor's own definition; whatever the batches."""
    base = load(name)
    editor = moved(base)
    shares = {target.name: 0.1 for target in base.targets}
    found = joint_update(base, editor, REQUESTS, 0.1)
    batched = joint_update(base, editor, REQUESTS, 0.1, batch_size=1)
    with torch.no_grad():
        changes = dense_joint(base, editor, REQUESTS, shares)
    for module, change in changes.items():
        expected = change.T.float()
        assert expected.norm() > 1e-3
        for update in (found, batched):
            # Signals of batches and of dense copies differ by float32 sums, pass after pass.
            size = expected.abs().max().item()
            torch.testing.assert_close(dense(update[module]), expected, atol=1e-3 * size, rtol=1e-2)


@pytest.mark.parametrize("method", ["ultra", "instructedit-joint"])
def test_edits_of_a_batch_stay_apart(load: Callable[..., Base], method: str) -> None:
    """Each edit of a batch is the joint update of it alone."""
    base = load("gpt2")
    if method == "ultra":
        update = ultra_method(fitted_editor(base, REQUESTS), rate=0.1, regularisation=0.1)(base, REQUESTS)
        editor = fitted_editor(base, REQUESTS, 0.1)
    else:
        editor = moved(base)
        update = editor_method(editor)(base, REQUESTS)
    for edit, request in enumerate(REQUESTS):
        alone = joint_update(base, editor, [request], 0.1)
        for module, (a, b) in update.items():
            expected = dense(alone[module])
            assert expected.norm() > 1e-3
            size = expected.abs().max().item()
            torch.testing.assert_close(b[edit].T @ a[edit], expected, atol=1e-3 * size, rtol=1e-2)
