"""The editor: signals of a batch of edits in, their low-rank updates out.

For each edit target m and token t: normalise u and δ, map them by the hypernetwork of m's shape to ũ and δ̃, and sum
over the edit's tokens:  ΔW_m = -Σ_t rate_mt δ̃_t (ũ_t / σ_m)ᵀ = BᵀA  with A = ũ / σ_m and B = -rate_mt δ̃  (MEND, eq. 5;
the sign stands here and nowhere else), σ_m being the deviations that u was divided by. Keys A may be whitened further
(`ie.editor.whitener`). A prompt's last token has a rate of its own: what stands there is more of the relation than of
the subject. What kind of edit it is, as far as its instruction tells (`ie.editor.kinds`), opens parts of the network
of its own and moves the rates. Unfitted and untrained, with rates of 1, the update is the loss's gradient.

Of an edit in several passes (`ie.editor.passes`) each goes equally far: deltas are scaled to a mean square of 1 over
all tokens and modules of an edit, since they vanish as the target becomes likely.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ie.base.capture import Signals
from ie.base.targets import EditTarget, read_target
from ie.base.update import Factors
from ie.editor.kinds import Kinds, opened
from ie.editor.network import Hypernetwork, routes
from ie.editor.normaliser import Normaliser
from ie.editor.whitener import Whitener
from ie.errors import IEError

__all__ = ["JOINT", "Editor", "EditorSettings", "Method"]

Method = Literal["instructedit", "mend", "instructedit-joint"]
JOINT: Method = "instructedit-joint"
_REGULARISATION = 0.1
_CARE = 0.6  # of what kinds' rates are in the mean, for an edit of a kind that training never saw (docs/experiments.md)
_LEAST_SIZE = 1e-6  # of an edit's normalised deltas: a target that is certain has no gradient left to scale up


class EditorSettings(BaseModel):
    """Shape of an editor.

    Attributes:
        method: `instructedit` reads the instruction, `mend` doesn't; `instructedit-joint` is `instructedit` trained for
            edits that become one update by least squares, and knows how far to regularise them.
        rank: rank of the hypernetwork's layers; what a kind has of its own there has half of it.
        n_layers: number of its layers.
        n_kinds: number of kinds of edits that instructions tell apart; 0 for an editor that makes no difference.
        rate: the learned rates' start, of all passes together.
        opening_share: the start of the rate of a prompt's last token, as a share of that.
        passes: how many gradients an edit is made of in training, see `ie.editor.passes`.
        n_whitened: principal directions of a module's inputs that keys are whitened along, see `ie.editor.whitener`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "instructedit"
    rank: PositiveInt = 128
    n_layers: int = 2
    n_kinds: NonNegativeInt = 0
    rate: PositiveFloat = 1e-3
    opening_share: PositiveFloat = 1.0
    passes: PositiveInt = 1
    n_whitened: NonNegativeInt = 0

    def for_tasks(self, n_tasks: int) -> EditorSettings:
        """The same, with a kind for each task if instructions are read and there is more than one to tell apart."""
        return self.model_copy(update={"n_kinds": n_tasks if n_tasks > 1 and self.method != "mend" else 0})


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
        whitened = targets if settings.n_whitened else ()
        self.whiteners = nn.ModuleDict({_key(t.name): Whitener(t.d_in, settings.n_whitened) for t in whitened})
        self.delta_normalisers = nn.ModuleDict({_key(t.name): Normaliser(t.d_out) for t in targets})
        self.kinds = Kinds(read_target(targets).d_in, settings.n_kinds) if settings.n_kinds else None
        rates = torch.tensor([1.0, settings.opening_share]) * settings.rate / settings.passes
        logarithms = torch.cat((rates.log()[None], torch.zeros(settings.n_kinds, 2)))
        self.log_rates = nn.ParameterDict({_key(t.name): nn.Parameter(logarithms.clone()) for t in targets})
        start = torch.tensor(_REGULARISATION).log()
        self.log_regularisations = nn.ParameterDict(
            {_key(t.name): nn.Parameter(start.clone()) for t in targets if settings.method == JOINT}
        )
        self.networks = nn.ModuleDict(
            {
                f"{d_in}x{d_out}": Hypernetwork(
                    d_in + d_out, len(group), settings.rank, settings.n_layers, settings.n_kinds
                )
                for (d_in, d_out), group in self._groups().items()
            }
        )

    def _groups(self) -> dict[tuple[int, int], list[EditTarget]]:
        groups: dict[tuple[int, int], list[EditTarget]] = {}
        for target in self.targets:
            groups.setdefault((target.d_in, target.d_out), []).append(target)
        return groups

    def rates(self, target: EditTarget, kinds: Tensor | None = None) -> Tensor:
        """The learned rates of one edit target, positive: of any token, and of a prompt's last.

        Args:
            target: the edit target.
            kinds: (n_edits, n_kinds + 1) float32, each edit's shares of kinds and of none; None without instructions.

        Returns:
            (n_edits, 2) float32; (1, 2) without kinds.
        """
        logarithms: Tensor = self.log_rates[_key(target.name)]
        if kinds is None:
            return logarithms[:1].exp()
        of_kinds = logarithms[1:]
        of_none = of_kinds.mean(0, keepdim=True) + math.log(_CARE)
        moved = (kinds[:, :, None] * torch.cat((of_kinds, of_none))).sum(1)
        return (logarithms[:1] + moved).exp()

    def regularisations(self) -> dict[str, Tensor | float]:
        """λ of a joint update for each module path, see `ie.editor.least_squares`: learned, or 0.1 throughout."""
        learned = self.log_regularisations
        return {t.name: learned[_key(t.name)].exp() if learned else _REGULARISATION for t in self.targets}

    @torch.no_grad()
    def observe(self, signals: Signals) -> None:
        """Take signals into the statistics that `fit` then sets; `Kinds.observe` takes instructions."""
        for target in self.targets:
            seen = signals.modules[target.name]
            self.u_normalisers[_key(target.name)].observe(seen.u)  # type: ignore[operator]
            self.delta_normalisers[_key(target.name)].observe(seen.delta)  # type: ignore[operator]
            if self.whiteners:
                self.whiteners[_key(target.name)].observe(seen.u)  # type: ignore[operator]

    def observed(self) -> list[Tensor]:
        """What `observe` has gathered, float64: sums, so what several processes gathered adds up."""
        sums = [part for one in self._normalisers() for part in (one.count, one.total, one.squares)]
        sums += [one.moment for one in self.whiteners.values()]  # type: ignore[misc]
        return sums + ([self.kinds.count, self.kinds.total, self.kinds.moment] if self.kinds else [])  # type: ignore[list-item]

    def fit(self) -> None:
        """Set normalisers, whiteners and kinds to what was observed."""
        for normaliser in self._normalisers():
            normaliser.fit()
        for key, whitener in self.whiteners.items():
            whitener.fit(self.u_normalisers[key].std)  # type: ignore[operator]
        if self.kinds is not None:
            self.kinds.fit()

    def _normalisers(self) -> Iterator[Normaliser]:
        for group in (self.u_normalisers, self.delta_normalisers):
            yield from group.values()  # type: ignore[misc]

    def update(
        self, signals: Signals, kinds: Tensor | None = None, keys: Mapping[str, Tensor] | None = None
    ) -> dict[str, Factors]:
        """The updates of a batch of edits, in one pass.

        Args:
            signals: of n edits, by module.
            kinds: (n, n_kinds + 1) float32, each edit's shares of kinds and of none; None without instructions.
            keys: A of an earlier pass, to be kept; None makes it.

        Returns:
            For each module path A (n, r, d_in) and B (n, r, d_out), float32; r is the largest number of tokens of an
            edit, rows beyond an edit's own tokens are zero.
        """
        update: dict[str, Factors] = {}
        normal = self._normal(signals)
        weights = None if kinds is None else opened(kinds)
        for (d_in, d_out), group in self._groups().items():
            sizes = [len(normal[target.name]) for target in group]
            index = torch.arange(len(group), device=normal[group[0].name].device)
            module = index.repeat_interleave(torch.tensor(sizes, device=index.device))
            edit = torch.cat([signals.modules[target.name].edit for target in group])
            network = self.networks[f"{d_in}x{d_out}"]
            joined = torch.cat([normal[target.name] for target in group])
            pseudo = network(joined, module, routes(weights, edit)).split(sizes)
            for target, part in zip(group, pseudo, strict=True):
                seen = signals.modules[target.name]
                u, delta = part.split((d_in, d_out), -1)
                rates = self.rates(target, kinds).expand(signals.n_edits, 2)
                rate = rates[seen.edit, seen.opening.long()][:, None]
                a = keys[target.name] if keys else _pack(self._made_keys(target, u), seen.edit, signals.n_edits)
                update[target.name] = a, _pack(-rate * delta, seen.edit, signals.n_edits)
        return update

    def clip_gradients(self, norm: float) -> None:
        """Let no gradient be larger: of the rates, of what all kinds have in common, and of what each has of its own.

        A kind's gradient is not made smaller by the size of another's that the same batch holds.

        Raises:
            IEError: if a gradient is not finite, before anything is changed by it.
        """
        layers = [layer for network in self.networks.values() for layer in network.layers]  # type: ignore[union-attr]
        parts = [[layer.common for layer in layers]]
        parts += [[layer.kinds[kind] for layer in layers] for kind in range(self.settings.n_kinds)]
        found = [
            nn.utils.clip_grad_norm_([one for module in modules for one in module.parameters()], norm)
            for modules in ([self.log_rates, self.log_regularisations], *parts)
        ]
        if not sum(found).isfinite():  # type: ignore[union-attr]
            raise IEError(
                "the gradient of training is not finite",
                hint="train anew with a lower rate or learning_rate, or with --dtype float32",
            )

    def sizes(self, signals: Signals) -> Tensor:
        """Root mean square of each edit's normalised deltas, (n_edits,) float32: how much its target is still amiss."""
        total, count = (signals.modules[self.targets[0].name].delta.new_zeros(signals.n_edits) for _ in range(2))
        for target in self.targets:
            seen = signals.modules[target.name]
            total.index_add_(0, seen.edit, self._scaled(target, seen.delta).square().sum(-1))
            count.index_add_(0, seen.edit, torch.full_like(seen.delta[:, 0], target.d_out))
        return (total / count.clamp(min=1)).sqrt().clamp(min=_LEAST_SIZE)

    def whitened(self, name: str, u: Tensor) -> Tensor:
        """Inputs of an edit target as uW, (n, d_in) float32, W Wᵀ being the inverse of their second moment."""
        return self._root(name, u / self.u_normalisers[_key(name)].std)  # type: ignore[operator]

    def unwhitened(self, name: str, a: Tensor) -> Tensor:
        """Keys for inputs (n, d_in) float32 from keys for whitened inputs: aWᵀ."""
        return self._root(name, a) / self.u_normalisers[_key(name)].std  # type: ignore[operator]

    def _root(self, name: str, values: Tensor) -> Tensor:
        return self.whiteners[_key(name)].root(values) if self.whiteners else values  # type: ignore[operator]

    def _normal(self, signals: Signals) -> dict[str, Tensor]:
        """Normalised [u, δ] (n_tokens, d_in + d_out) of each edit target."""
        deltas = {t.name: self._scaled(t, signals.modules[t.name].delta) for t in self.targets}
        if self.settings.passes > 1:
            size = self.sizes(signals)
            deltas = {name: delta / size[signals.modules[name].edit, None] for name, delta in deltas.items()}
        return {
            t.name: torch.cat((self.u_normalisers[_key(t.name)](signals.modules[t.name].u), deltas[t.name]), -1)
            for t in self.targets
        }

    def _made_keys(self, target: EditTarget, u: Tensor) -> Tensor:
        """Keys (n_tokens, d_in) of pseudo-activations: what the module's inputs are multiplied by."""
        normaliser: Normaliser = self.u_normalisers[_key(target.name)]  # type: ignore[assignment]
        if self.whiteners:
            u = self.whiteners[_key(target.name)](u + normaliser.mean / normaliser.std)
        return u / normaliser.std

    def _scaled(self, target: EditTarget, delta: Tensor) -> Tensor:
        """Deltas by their features' deviations: not centred, for a gradient near zero has no direction to add."""
        std: Tensor = self.delta_normalisers[_key(target.name)].std  # type: ignore[assignment]
        return delta / std


def _pack(rows: Tensor, edit: Tensor, n_edits: int) -> Tensor:
    """Sort token rows into one block an edit, zero rows below."""
    counts = torch.bincount(edit, minlength=n_edits)
    slot = torch.arange(len(edit), device=edit.device) - (counts.cumsum(0) - counts)[edit]
    n_rows = int(counts.max()) if len(edit) else 0
    return rows.new_zeros(n_edits, n_rows, rows.shape[-1]).index_put((edit, slot), rows)


def _key(name: str) -> str:
    return name.replace(".", "/")  # torch allows no dot in the name of a submodule
