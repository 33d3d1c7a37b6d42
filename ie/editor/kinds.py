"""Which of training's kinds of edits an instruction tells of.

What the base makes of an instruction is compared with the means of training's kinds, along the directions that tell
these best apart (Fisher's linear discriminants), in deviations within a kind. A kind's share is its probability, were
each kind a Gaussian of the same covariance. What is of no kind is one more in the middle of them all, for an unknown
kind has little of what tells the known ones apart, and as likely everywhere as a kind is half of the way between the
nearest two, for it may also be unlike anything known. It opens the parts of all kinds alike, so that what they disagree
on evens out (docs/experiments.md). Edits without an instruction open none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ie.base.instructions import Readings
from ie.editor.whitener import add_moment

__all__ = ["Kinds", "opened"]

_SHRINKAGE = 0.3  # of the covariance within kinds, as a share of its mean eigenvalue
_ROUNDING = 1e-8  # of the second moment: what a variance may come out as that is zero, and more
_FAR = 1e6  # how far kinds stand from all others that no instruction told of


class Kinds(nn.Module):
    """Shares of kinds from what is read of instructions; unfitted every instruction is of none.

    Args:
        d_features: dimension of what is read.
        n_kinds: how many kinds there are, at least two.
    """

    mean: Tensor  # (d_features,)
    directions: Tensor  # (n_kinds - 1, d_features)
    places: Tensor  # (n_kinds, n_kinds - 1), the kinds' means along the directions
    count: Tensor
    total: Tensor
    moment: Tensor | None  # of what was observed, (d, d) float64: large, and gone once it is fitted

    def __init__(self, d_features: int, n_kinds: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(d_features))
        self.register_buffer("directions", torch.zeros(n_kinds - 1, d_features))
        self.register_buffer("places", _FAR * torch.arange(1.0, n_kinds + 1)[:, None].repeat(1, n_kinds - 1))
        self.register_buffer("count", torch.zeros(n_kinds, dtype=torch.float64), persistent=False)
        self.register_buffer("total", torch.zeros(n_kinds, d_features, dtype=torch.float64), persistent=False)
        self.moment = None

    @torch.no_grad()
    def observe(self, read: Readings, kind: int) -> None:
        """Take in what was read of a kind's instructions."""
        values = read.inputs[read.given].double()
        self.count[kind] += len(values)
        self.total[kind] += values.sum(0)
        self.moment = add_moment(self.moment, values)

    @torch.no_grad()
    def fit(self) -> None:
        """Set everything to what was observed; where fewer than two kinds were told of, nothing is."""
        moment, self.moment = self.moment, None
        told = self.count > 0
        if moment is None or int(told.sum()) < 2:
            return
        means = self.total[told] / self.count[told, None]
        within = (moment - self.total[told].T @ means) / self.count.sum()
        least = (_ROUNDING * moment.trace()).clamp(min=1e-12)  # of kinds with a single instruction each none is left
        mean_variance = within.trace().clamp(min=least) / len(within)
        within += _SHRINKAGE * mean_variance * torch.eye(len(within), device=within.device)
        root = torch.linalg.cholesky(within)
        mean = means.mean(0)
        apart = torch.linalg.solve_triangular(root, (means - mean).T, upper=False)  # in deviations within a kind
        basis = torch.linalg.svd(apart, full_matrices=False)[0][:, : len(means) - 1]
        directions = torch.linalg.solve_triangular(root.T, basis, upper=True).T
        places = (means - mean) @ directions.T
        self.mean.copy_(mean)
        self.directions[: len(directions)] = directions.float()
        self.places[told] = nn.functional.pad(places, (0, len(told) - len(means))).float()

    def forward(self, read: Readings) -> Tensor:
        """Shares (n, n_kinds + 1) float32 of n instructions, the last that of no kind; zeros without an instruction."""
        at = (read.inputs - self.mean) @ self.directions.T
        # Less the log-density of a kind at their mean, so that a reading's own length cancels.
        of_kinds = at @ self.places.T - 0.5 * self.places.square().sum(-1)
        reach = torch.pdist(self.places).min() / 2
        of_none = torch.logaddexp(torch.zeros(()).to(at), 0.5 * (at.square().sum(-1) - reach**2))
        return torch.cat((of_kinds, of_none[:, None]), 1).softmax(-1) * read.given[:, None]


def opened(shares: Tensor) -> Tensor:
    """How far each kind's part counts, (n, n_kinds), for shares (n, n_kinds + 1): what is of none is of all alike."""
    return shares[:, :-1] + shares[:, -1:] / (shares.shape[1] - 1)
