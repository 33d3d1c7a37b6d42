"""Normalising signals feature by feature, so that the hypernetwork sees the same scale from every module and base.

Statistics are fitted once, on the signals of training edits, before the first training step; they are buffers, part of
the editor's file like its weights. (MEND goes on moving them during training, and its published code loses on resuming
that they were ever set.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Normaliser"]


class Normaliser(nn.Module):
    """Mean and standard deviation of each feature of a module's activations or deltas.

    Unfitted it is the identity.

    Args:
        d_features: number of features.
    """

    mean: Tensor
    std: Tensor
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, d_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(d_features))
        self.register_buffer("std", torch.ones(d_features))
        # Sums in double: millions of tokens add up, and a variance is a difference of large numbers.
        self.register_buffer("count", torch.zeros((), dtype=torch.float64), persistent=False)
        self.register_buffer("total", torch.zeros(d_features, dtype=torch.float64), persistent=False)
        self.register_buffer("squares", torch.zeros(d_features, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def observe(self, values: Tensor) -> None:
        """Take in values (n_tokens, d_features)."""
        values = values.double()
        self.count += values.shape[0]
        self.total += values.sum(0)
        self.squares += values.square().sum(0)

    @torch.no_grad()
    def fit(self) -> None:
        """Set mean and standard deviation to those of all values observed."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0)
        self.mean.copy_(mean)
        # A feature that never varies (a dead one) would be blown up by its rounding noise: leave it as it is.
        std = variance.sqrt()
        self.std.copy_(torch.where(std > 1e-3 * std.mean(), std, torch.ones_like(std) * std.mean().clamp(min=1e-12)))

    def forward(self, values: Tensor) -> Tensor:
        """(n_tokens, d_features) float32 to the same, normalised."""
        return (values - self.mean) / self.std
