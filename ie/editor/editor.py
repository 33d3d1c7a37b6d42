"""The editor: signals of a batch of edits in, their low-rank updates out.

For each edit target m and token t: normalise u and δ, map them by the hypernetwork of m's shape to ũ and δ̃, and sum
over the edit's tokens:  ΔW_m = -rate_m Σ_t δ̃_t ũ_tᵀ = BᵀA  with A = ũ and B = -rate_m δ̃  (MEND, eq. 5; the sign
stands here and nowhere else). Before it is fitted and trained, with rates of 1, the update is the loss's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ie.base.capture import Signals
from ie.base.targets import EditTarget
from ie.base.update import Factors
from ie.editor.network import Hypernetwork
from ie.editor.normaliser import Normaliser

__all__ = ["JOINT", "Editor", "EditorSettings", "Method"]

Method = Literal["instructedit", "mend", "instructedit-joint"]
JOINT: Method = "instructedit-joint"
_REGULARISATION = 0.1


class EditorSettings(BaseModel):
    """Shape of an editor.

    Attributes:
        method: `instructedit` reads the instruction, `mend` doesn't; `instructedit-joint` is `instructedit` trained for
            edits that become one update by least squares, and knows how far to regularise them.
        rank: rank of the hypernetwork's layers.
        n_layers: number of its layers.
        rate: the learned rates' start.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "instructedit"
    rank: PositiveInt = 128
    n_layers: int = 2
    rate: PositiveFloat = 1e-3

    @property
    def reads_instructions(self) -> bool:
        """Whether requests come to the editor with their instruction."""
        return self.method != "mend"


class Editor(nn.Module):
    """Turns the signals of edit requests into low-rank updates of a base model's edit targets.

    Args:
        targets: the modules to edit.
        settings: the editor's shape.
    """

    def __init__(self, targets: Sequence[EditTarget], settings: EditorSettings) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.settings = settings
        self.u_normalisers = nn.ModuleDict({_key(t.name): Normaliser(t.d_in) for t in targets})
        self.delta_normalisers = nn.ModuleDict({_key(t.name): Normaliser(t.d_out) for t in targets})
        self.log_rates = nn.ParameterDict(
            {_key(t.name): nn.Parameter(torch.tensor(settings.rate).log()) for t in targets}
        )
        start = torch.tensor(_REGULARISATION).log()
        self.log_regularisations = nn.ParameterDict(
            {_key(t.name): nn.Parameter(start.clone()) for t in targets if settings.method == JOINT}
        )
        self.networks = nn.ModuleDict(
            {
                f"{d_in}x{d_out}": Hypernetwork(d_in + d_out, len(group), settings.rank, settings.n_layers)
                for (d_in, d_out), group in self._groups().items()
            }
        )

    def _groups(self) -> dict[tuple[int, int], list[EditTarget]]:
        groups: dict[tuple[int, int], list[EditTarget]] = {}
        for target in self.targets:
            groups.setdefault((target.d_in, target.d_out), []).append(target)
        return groups

    def rate(self, target: EditTarget) -> Tensor:
        """The learned rate of one edit target, () float32, positive."""
        return torch.exp(self.log_rates[_key(target.name)])

    def regularisations(self) -> dict[str, Tensor | float]:
        """λ of a joint update for each module path, see `ie.editor.least_squares`: learned, or 0.1 throughout."""
        learned = self.log_regularisations
        return {t.name: learned[_key(t.name)].exp() if learned else _REGULARISATION for t in self.targets}

    @torch.no_grad()
    def observe(self, signals: Signals) -> None:
        """Take signals into the normalisers' statistics; `fit` then sets them."""
        for target in self.targets:
            seen = signals.modules[target.name]
            self.u_normalisers[_key(target.name)].observe(seen.u)  # type: ignore[operator]
            self.delta_normalisers[_key(target.name)].observe(seen.delta)  # type: ignore[operator]

    def observed(self) -> list[Tensor]:
        """What `observe` has gathered, float64: sums, so what several processes gathered adds up."""
        normalisers = (*self.u_normalisers.values(), *self.delta_normalisers.values())
        return [part for one in normalisers for part in (one.count, one.total, one.squares)]  # type: ignore[misc]

    def fit(self) -> None:
        """Set the normalisers to what was observed."""
        for normaliser in (*self.u_normalisers.values(), *self.delta_normalisers.values()):
            normaliser.fit()  # type: ignore[operator]

    def update(self, signals: Signals) -> dict[str, Factors]:
        """The updates of a batch of edits.

        Args:
            signals: of n edits, by module.

        Returns:
            For each module path A (n, r, d_in) and B (n, r, d_out), float32; r is the largest number of tokens of an
            edit, rows beyond an edit's own tokens are zero.
        """
        update: dict[str, Factors] = {}
        for (d_in, d_out), group in self._groups().items():
            seen = [signals.modules[target.name] for target in group]
            normal = [
                torch.cat((self.u_normalisers[_key(t.name)](s.u), self.delta_normalisers[_key(t.name)](s.delta)), -1)
                for t, s in zip(group, seen, strict=True)
            ]
            sizes = [len(part) for part in normal]
            index = torch.arange(len(group), device=normal[0].device)
            module = index.repeat_interleave(torch.tensor(sizes, device=index.device))
            pseudo = self.networks[f"{d_in}x{d_out}"](torch.cat(normal), module).split(sizes)
            for target, part, s in zip(group, pseudo, seen, strict=True):
                u, delta = part.split((d_in, d_out), -1)
                update[target.name] = _pack(u, -self.rate(target) * delta, s.edit, signals.n_edits)
        return update


def _pack(a: Tensor, b: Tensor, edit: Tensor, n_edits: int) -> Factors:
    """Sort token rows into one block an edit, zero rows below."""
    counts = torch.bincount(edit, minlength=n_edits)
    slot = torch.arange(len(edit), device=edit.device) - (counts.cumsum(0) - counts)[edit]
    place = (edit, slot)
    rank = int(counts.max()) if len(edit) else 0
    return (
        a.new_zeros(n_edits, rank, a.shape[-1]).index_put(place, a),
        b.new_zeros(n_edits, rank, b.shape[-1]).index_put(place, b),
    )


def _key(name: str) -> str:
    return name.replace(".", "/")  # torch allows no dot in the name of a submodule
