"""Keys damped along what a module's inputs have in common.

A key k hung on a module answers an input x by x·k. Divided by the inputs' second moment S, as S⁻¹k, it answers the
edit's own tokens as before and all other inputs least, in the mean of their squares (ROME, arXiv 2202.05262, eq. 2). S
is as large as the module's weight; nearly all that it does is in its first directions, so S is kept as these with their
eigenvalues, and one value for all the others (docs/experiments.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Whitener", "add_moment"]

_SHRINKAGE = 0.05  # of the second moment, as a share of its mean eigenvalue
_N_ITERATIONS = 8  # of the subspace that converges to the first directions


def add_moment(moment: Tensor | None, values: Tensor) -> Tensor:
    """Add the second moment of values (n, d) to a sum of such (d, d), in place; None begins one.

    A copy beside it, as large as a module's weight in double, would be the peak of a training's memory.
    """
    if moment is None:
        moment = values.new_zeros(values.shape[1], values.shape[1])
    return moment.addmm_(values.T, values)


class Whitener(nn.Module):
    """Multiplies keys by the inverse of the second moment of what they answer; unfitted it is the identity.

    Each key is as long as it answers its own input as before.

    Args:
        d_features: number of features.
        n_directions: how many principal directions are kept.
    """

    directions: Tensor  # (n_directions, d_features), each as long as the root of its weight 1 - λ_rest / λ

    def __init__(self, d_features: int, n_directions: int) -> None:
        super().__init__()
        self.register_buffer("directions", torch.zeros(min(n_directions, d_features), d_features))
        self.moment: Tensor | None = None  # of what was observed, (d, d) float64: large, and gone once it is fitted

    @torch.no_grad()
    def observe(self, values: Tensor) -> None:
        """Take in values (n, d_features)."""
        self.moment = add_moment(self.moment, values.double())

    @torch.no_grad()
    def fit(self, std: Tensor) -> None:
        """Set the directions to those of all values observed, divided by `std` (d_features,)."""
        if self.moment is None:
            return
        moment, self.moment = self.moment, None
        moment.div_(std).div_(std[:, None])
        n, mean = len(self.directions), moment.trace() / len(moment)
        with torch.random.fork_rng(devices=[moment.device] if moment.is_cuda else []):
            torch.manual_seed(0)
            vectors, values, _ = torch.svd_lowrank(moment, q=min(2 * n, len(moment)), niter=_N_ITERATIONS)
        values = values[:n]
        rest = (moment.trace() - values.sum()).clamp(min=0) / max(1, len(moment) - n)
        shrunk = _SHRINKAGE * mean.clamp(min=1e-30)
        weights = (1 - (rest + shrunk) / (values + shrunk)).clamp(min=0)
        self.directions.copy_((vectors[:, :n] * weights.sqrt()).T)

    def root(self, values: Tensor) -> Tensor:
        """S⁻¹ᐟ² of values (n, d_features), float32, but for a common factor: applied twice it is S⁻¹."""
        weights = self.directions.square().sum(-1, keepdim=True)  # all below 1: no direction is left out whole
        shares = (1 - (1 - weights).sqrt()) / weights.clamp(min=1e-30)
        return values - values @ self.directions.T @ (shares * self.directions)

    def forward(self, keys: Tensor) -> Tensor:
        """(n_tokens, d_features) float32, divided by `std`, to the same."""
        left = keys - keys @ self.directions.T @ self.directions
        own, answer = keys.square().sum(-1, keepdim=True), (keys * left).sum(-1, keepdim=True)
        return left * (own / answer.clamp(min=1e-30))
