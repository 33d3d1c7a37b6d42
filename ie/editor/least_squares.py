"""Many edits as one update, by least squares over all their tokens (MALMEN, arXiv 2311.04661, section 3).

A sum of many edits' updates is spoilt by what each does to the others' tokens. Instead, with the module's input u_t at
each token t of each edit, and the change d_t of its output there that the edit asks for, the joint update is

    ΔWᵀ = argmin_X Σ_t ‖u_t X - d_t‖² + λ tr(Xᵀ S X) = (HᵀU + λI)⁻¹ Hᵀ D      U, H (n, d_in), D (n, d_out)
                                                     = Hᵀ (UHᵀ + λI)⁻¹ D      the dual, for n < d_in

with keys h_t = S⁻¹ u_t, and d_t = (u_t · ũ_t) b_t, which is what the token's own part ũ_t, b_t of its edit's update
does there. S is the inputs' second moment as the editor knows it (`Editor.answering`): the update is small where other
texts go (MEMIT, arXiv 2210.07229, eq. 14). MALMEN has S = I, and λ free of scale; here it is a share of the mean of
u · h, so that one value serves every base and module. Sums over chunks and solves are float64, for HᵀU squares the
condition; a chunk's own products are float32: its signals are no more precise, and float64 is slow.
Pseudo-activations as keys were tried: they disturb the rest of the model far more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ie.base.capture import ModuleSignals, Signals
from ie.base.update import Factors, Update, whole
from ie.errors import EditorError

__all__ = ["Answering", "Joint", "LeastSquares", "Regularisations", "each_alone"]

Answering = Callable[[str, Tensor], Tensor]  # see `Editor.answering`
Regularisations = Mapping[str, Tensor | float]  # λ by module path


class LeastSquares:
    """One module's least squares, taken in chunk by chunk.

    Tokens are kept while they are fewer than the keys' features, and summed up from then on: memory is bounded by
    d_in (d_in + d_out), whatever the number of edits.

    Args:
        regularisation: λ as a share of the mean of u · h; positive.
    """

    def __init__(self, regularisation: Tensor | float) -> None:
        if not regularisation > 0:
            raise ValueError(f"regularisation is {regularisation}, expected a positive number")
        self.regularisation = regularisation
        self.n_tokens = 0
        self._energy = 0.0
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sums: tuple[Tensor, Tensor] | None = None  # HᵀU (d_in, d_in) and HᵀD (d_in, d_out)

    def add(self, inputs: Tensor, keys: Tensor, values: Tensor) -> None:
        """Take in inputs and keys (n_tokens, d_in) and wanted changes (n_tokens, d_out), float32."""
        self.n_tokens += len(keys)
        self._energy += float((inputs * keys).sum(dtype=torch.float64))
        self._rows.append((inputs, keys, values))
        if self.n_tokens >= keys.shape[1]:
            for u, h, d in self._rows:
                gram, cross = (h.T @ u).double(), (h.T @ d).double()
                self._sums = (gram, cross) if self._sums is None else (self._sums[0] + gram, self._sums[1] + cross)
            self._rows = []

    def solve(self) -> Factors:
        """The joint update, a batch of one, as factors of rank min(n_tokens, d_in, d_out), float32.

        Raises:
            EditorError: if it is not finite.
        """
        if not self.n_tokens:
            raise ValueError("no token was added")
        damping = self.regularisation * self._energy / self.n_tokens or 1.0  # inputs that are all zero change nothing
        if self._sums is None:
            inputs, keys, values = (torch.cat(part).double() for part in zip(*self._rows, strict=True))
            a, b = keys[None], _solve(inputs @ keys.T, damping, values)[None]
        else:
            gram, cross = self._sums
            a, b = whole(_solve(gram, damping, cross)[None])
        if not (a.isfinite().all() and b.isfinite().all()):
            raise EditorError("the joint update is not finite", hint="take a larger regularisation")
        return a.float(), b.float()


class Joint:
    """The joint update of all edits, module by module; see `LeastSquares`.

    Args:
        regularisations: λ for each module path.
        answering: makes a module's keys of its inputs.
    """

    def __init__(self, regularisations: Regularisations, answering: Answering) -> None:
        self._regularisations, self._answering = regularisations, answering
        self._modules: dict[str, LeastSquares] = {}

    def add(self, signals: Signals, update: Update) -> None:
        """Take in the signals of n edits and the n updates that an editor makes of them."""
        for name, factors in update.items():
            seen = signals.modules[name]
            module = self._modules.setdefault(name, LeastSquares(self._regularisations[name]))
            module.add(seen.u, self._answering(name, seen.u), _wanted(seen, factors)[1])

    def solve(self) -> dict[str, Factors]:
        """The joint update by module path, a batch of one; see `LeastSquares.solve`."""
        return {name: module.solve() for name, module in self._modules.items()}


def each_alone(
    signals: Signals, update: Update, regularisations: Regularisations, answering: Answering
) -> dict[str, Factors]:
    """The least squares of each edit's own tokens: n edits that stay n edits, in the dual form.

    Args:
        signals: of n edits.
        update: the n updates that an editor makes of them.
        regularisations: see `Joint`.
        answering: see `Joint`.
    """
    out = {}
    for name, factors in update.items():
        seen = signals.modules[name]
        own, wanted = _wanted(seen, factors)
        inputs, keys, values = (torch.zeros_like(factors[i], dtype=torch.float64) for i in (0, 0, 1))
        inputs[own], keys[own], values[own] = seen.u.double(), answering(name, seen.u).double(), wanted.double()
        energy = (inputs * keys).sum((1, 2)) / own.sum(1).clamp(min=1)
        damping = (regularisations[name] * energy).masked_fill(energy == 0, 1.0)
        out[name] = (keys.float(), _solve(inputs @ keys.mT, damping[:, None, None], values).float())
    return out


def _wanted(seen: ModuleSignals, factors: Factors) -> tuple[Tensor, Tensor]:
    """Which rows of n updates are tokens, (n, r) bool, and the change wanted at each token, (n_tokens, d_out)."""
    a, b = factors
    counts = torch.bincount(seen.edit, minlength=len(a))
    own = torch.arange(a.shape[1], device=a.device) < counts[:, None]  # row by row in the order of the signals' tokens
    return own, (seen.u * a[own]).sum(-1, keepdim=True) * b[own]


def _solve(gram: Tensor, damping: Tensor | float, right: Tensor) -> Tensor:
    """(gram + damping · I)⁻¹ right, for products (..., n, n) of positive definite matrices."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(gram + damping * eye, right)
    return solved
