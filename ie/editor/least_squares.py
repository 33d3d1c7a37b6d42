"""Many edits as one update, by least squares over all their tokens (MALMEN, arXiv 2311.04661, section 3).

A sum of many edits' updates is spoilt by what each does to the others' tokens. Instead, with a key k_t for each token t
of each edit, and the change d_t of the module's output there that the edit asks for, the joint update is

    X = argmin_X Σ_t ‖k_t X - d_t‖² + λ‖X‖² = (KᵀK + λI)⁻¹ Kᵀ D      K (n, d_in), D (n, d_out)
                                            = Kᵀ (KKᵀ + λI)⁻¹ D      the dual, for n < d_in

The keys are the module's inputs u, whitened: k = uW, and ΔWᵀ = W X is small where other texts go (MEMIT, arXiv
2210.07229, eq. 14). d_t = (u_t · ũ_t) b_t is what the token's own part ũ_t, b_t of its edit's update does there. We
differ from MALMEN in W; in λ, which is a share of the keys' mean square norm, so that one value serves every base and
module; in that few tokens are solved in the dual; and in X's length: a compromise among many tokens gives each of them
less than it asks for, so X is as long as brings their outputs, in the mean square, what each would have got alone.

Sums over chunks and solves are float64, for KᵀK squares the condition; a chunk's own products are float32: its signals
are no more precise, and float64 is slow. Pseudo-activations as keys were tried: they disturb the model far more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ie.base.capture import ModuleSignals, Signals
from ie.base.update import Factors, Update, whole
from ie.editor.editor import Editor
from ie.errors import EditorError

__all__ = ["Joint", "LeastSquares", "Regularisations", "each_alone"]

Regularisations = Mapping[str, Tensor | float]  # λ by module path


class LeastSquares:
    """One module's least squares, taken in chunk by chunk.

    Tokens are kept while they are fewer than the keys' features, and summed up from then on: memory is bounded by
    d_in (d_in + d_out), whatever the number of edits.

    Args:
        regularisation: λ as a share of the keys' mean square norm; positive.
    """

    def __init__(self, regularisation: Tensor | float) -> None:
        if not regularisation > 0:
            raise ValueError(f"regularisation is {regularisation}, expected a positive number")
        self.regularisation = regularisation
        self.n_tokens = 0
        self._energy = self._wanted = 0.0  # sums of squares of keys and of values
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._sums: tuple[Tensor, Tensor] | None = None  # KᵀK (d_in, d_in) and KᵀD (d_in, d_out)

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Take in keys (n_tokens, d_in) and wanted changes (n_tokens, d_out), float32."""
        self.n_tokens += len(keys)
        self._energy += float(keys.square().sum(dtype=torch.float64))
        self._wanted += float(values.detach().square().sum(dtype=torch.float64))
        self._rows.append((keys, values))
        if self.n_tokens >= keys.shape[1]:
            for k, d in self._rows:
                gram, cross = (k.T @ k).double(), (k.T @ d).double()
                self._sums = (gram, cross) if self._sums is None else (self._sums[0] + gram, self._sums[1] + cross)
            self._rows = []

    def solve(self) -> Factors:
        """X as factors of a batch of one, of rank min(n_tokens, d_in, d_out), float32.

        Raises:
            EditorError: if it is not finite.
        """
        if not self.n_tokens:
            raise ValueError("no token was added")
        damping = self.regularisation * self._energy / self.n_tokens or 1.0  # keys that are all zero change nothing
        if self._sums is None:
            keys, values = (torch.cat(part).double() for part in zip(*self._rows, strict=True))
            gram = keys @ keys.T
            a, b = keys[None], _solve(gram, damping, values)[None]
            given = (gram @ b.detach()[0]).square().sum()
        else:
            gram, cross = self._sums
            change = _solve(gram, damping, cross)
            a, b = whole(change[None])
            given = (change.detach() * (gram @ change.detach())).sum()
        scale = _scale(self.regularisation, given, given.new_tensor(self._wanted))
        return _finite(a.float(), (b * scale).float())


class Joint:
    """The joint update of all edits, module by module; see `LeastSquares`.

    Args:
        editor: what made the edits' own updates; it whitens their inputs.
        regularisations: λ for each module path.
    """

    def __init__(self, editor: Editor, regularisations: Regularisations) -> None:
        self._editor, self._regularisations = editor, regularisations
        self._modules: dict[str, LeastSquares] = {}

    def add(self, signals: Signals, update: Update) -> None:
        """Take in the signals of n edits and the n updates that the editor makes of them."""
        for name, factors in update.items():
            seen = signals.modules[name]
            module = self._modules.setdefault(name, LeastSquares(self._regularisations[name]))
            module.add(self._editor.whitened(name, seen.u), _wanted(seen, factors)[1])

    def solve(self) -> dict[str, Factors]:
        """The joint update by module path, a batch of one; see `LeastSquares.solve`."""
        solved = {name: module.solve() for name, module in self._modules.items()}
        return {name: (self._editor.unwhitened(name, a), b) for name, (a, b) in solved.items()}


def each_alone(
    editor: Editor, signals: Signals, update: Update, regularisations: Regularisations
) -> dict[str, Factors]:
    """The least squares of each edit's own tokens: n edits that stay n edits, in the dual form.

    Args:
        editor: see `Joint`.
        signals: of n edits.
        update: the n updates that the editor makes of them.
        regularisations: see `Joint`.

    Raises:
        EditorError: if an update is not finite.
    """
    out = {}
    for name, factors in update.items():
        seen = signals.modules[name]
        own, wanted = _wanted(seen, factors)
        keys, values = (torch.zeros_like(factor, dtype=torch.float64) for factor in factors)
        keys[own], values[own] = editor.whitened(name, seen.u).double(), wanted.double()
        energy = keys.square().sum((1, 2)) / own.sum(1).clamp(min=1)
        damping = (regularisations[name] * energy).masked_fill(energy == 0, 1.0)
        gram = keys @ keys.mT
        b = _solve(gram, damping[:, None, None], values)
        scale = _scale(regularisations[name], (gram @ b).square().sum((1, 2)), values.square().sum((1, 2)))
        out[name] = _finite(editor.unwhitened(name, keys.float()), (b * scale[:, None, None]).float())
    return out


def _wanted(seen: ModuleSignals, factors: Factors) -> tuple[Tensor, Tensor]:
    """Which rows of n updates are tokens, (n, r) bool, and the change wanted at each token, (n_tokens, d_out)."""
    a, b = factors
    counts = torch.bincount(seen.edit, minlength=len(a))
    own = torch.arange(a.shape[1], device=a.device) < counts[:, None]  # row by row in the order of the signals' tokens
    return own, (seen.u * a[own]).sum(-1, keepdim=True) * b[own]


def _solve(gram: Tensor, damping: Tensor | float, right: Tensor) -> Tensor:
    """(gram + damping · I)⁻¹ right, for positive definite matrices (..., n, n)."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    try:
        return torch.cholesky_solve(right, torch.linalg.cholesky(gram + damping * eye))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # alike keys and hardly any damping, or NaN
        raise _unsolvable() from error


def _finite(a: Tensor, b: Tensor) -> Factors:
    if not (a.isfinite().all() and b.isfinite().all()):
        raise _unsolvable()
    return a, b


def _unsolvable() -> EditorError:
    return EditorError("the joint update is not finite", hint="take a larger regularisation")


def _scale(regularisation: Tensor | float, given: Tensor, wanted: Tensor) -> Tensor:
    """What brings the squared length of what is given to that of tokens each alone: d / (1 + λ), λ being a share."""
    share = regularisation.detach() if isinstance(regularisation, Tensor) else regularisation
    return ((wanted / given).sqrt() / (1 + share)).where(given > 0, 1.0)
