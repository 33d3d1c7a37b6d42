"""The hypernetwork: a residual low-rank MLP over normalised signals.

    h <- h + U silu(scale_m * (V h) + shift_m) + b,    h = [u, δ]

One network serves all edit targets of one shape; `scale` and `shift` are one row for each of them. U starts at zero, so
the network starts as the identity on the normalised signals.

MEND (arXiv 2110.11309, section 3.1) and InstructEdit put the non-linearity and the modules' rows behind U, in the
signal's own dimension: h + relu(scale_m * (U V h + b) + shift_m). Behind a U of zeros relu has no gradient, a residual
that can only add positive numbers wastes half of what it could say, and d_signal-wide rows cost more than the matrix
products. In V's low dimension all three are gone; the measured difference stands in docs/experiments.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Hypernetwork"]


class Hypernetwork(nn.Module):
    """Turns normalised activations and deltas into pseudo-activations and pseudo-deltas.

    Args:
        d_signal: d_in + d_out of the edit targets that it serves.
        n_modules: how many of them there are.
        rank: rank of each layer.
        n_layers: number of residual layers.
    """

    def __init__(self, d_signal: int, n_modules: int, rank: int, n_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(d_signal, n_modules, min(rank, d_signal)) for _ in range(n_layers))

    def forward(self, signal: Tensor, module: Tensor) -> Tensor:
        """Map signals token by token.

        Args:
            signal: (n_tokens, d_signal) float32, normalised [u, δ].
            module: (n_tokens,) int64, which edit target each token's signal is from.

        Returns:
            (n_tokens, d_signal) float32, [ũ, δ̃].
        """
        for layer in self.layers:
            signal = layer(signal, module)
        return signal


class _Layer(nn.Module):
    def __init__(self, d_signal: int, n_modules: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(d_signal, rank) / d_signal**0.5)
        self.scale = nn.Parameter(torch.ones(n_modules, rank))
        self.shift = nn.Parameter(torch.zeros(n_modules, rank))
        self.up = nn.Parameter(torch.zeros(rank, d_signal))
        self.bias = nn.Parameter(torch.zeros(d_signal))

    def forward(self, signal: Tensor, module: Tensor) -> Tensor:
        hidden = torch.addcmul(self.shift[module], self.scale[module], signal @ self.down)
        return signal + torch.addmm(self.bias, nn.functional.silu(hidden), self.up)
