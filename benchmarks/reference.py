"""A plain reference: one edit at a time, as published code makes it (MEND, and InstructEdit in EasyEdit), but that the
gradient is taken as often as our editor takes it.

The whole model runs forward and backward for each request, with a gradient for every parameter; every position passes
the output head; each module's ΔW is a dense matrix, part of the graph that the outer loss goes back through. What the
published code does beside that (statistics token by token in Python, norms of full matrices for its log) is left out.

The editor is ours, so that update and loss can be compared: `tests/benchmarks/test_reference.py` holds them equal.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

from ie.base.asking import Ask
from ie.base.capture import ModuleSignals, Signals
from ie.base.instructions import Readings
from ie.base.targets import is_transposed, read_target
from ie.data.tokens import Text, TextEncoder, TokenBatch, collate
from ie.editor.editor import Editor
from ie.editor.passes import FINER, FURTHER
from ie.editor.request import EditRequest
from ie.training.episodes import Episodes

__all__ = ["Dense", "Reference"]

Dense = Mapping[str, Tensor]  # ΔW by module path, as the module stores its weight


class Reference:
    """A base model of its own, every parameter trainable as `from_pretrained` leaves it, and an editor.

    Args:
        folder: the base model's folder, loaded in fp32 where the editor is.
        editor: for the edit targets of this base.
    """

    def __init__(self, folder: Path, editor: Editor) -> None:
        self.device = next(editor.parameters()).device
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model: nn.Module = model.to(self.device).train(False)
        self.encode = TextEncoder(AutoTokenizer.from_pretrained(folder), self.model.config.max_position_embeddings)
        self.editor = editor

    def update(self, request: EditRequest, finer: int = 1, further: int = 0) -> Dense:
        """ΔW of one edit, part of the editor's graph; `finer` as in `ie.editor.passes.propose`, `further` how many more
        passes it takes at most until its target is what the model would write.
        """
        plain = Ask(request.prompt, request.target, None)
        kinds, seen = self._kinds(request.instruction), self._signals(plain, {})
        factors = self.editor.update(seen, kinds)
        n_passes = finer * self.editor.settings.passes
        for number in range(1, n_passes + further):
            so_far = {name: change.detach() / finer for name, change in self._dense(factors).items()}
            if number >= n_passes and self._took(plain, so_far):
                break
            step = self.editor.update(self._signals(plain, so_far, seen), kinds)
            factors = {name: (a, b + step[name][1]) for name, (a, b) in factors.items()}
        return {name: change / finer for name, change in self._dense(factors).items()}

    def _dense(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Dense:
        dense = {name: torch.einsum("ri,ro->io", a[0], b[0]) for name, (a, b) in factors.items()}
        return {n: d if is_transposed(self.model.get_submodule(n)) else d.T for n, d in dense.items()}

    def _kinds(self, instruction: str | None) -> Tensor | None:
        return None if self.editor.kinds is None else self.editor.kinds(self._read(instruction))

    def _read(self, instruction: str | None) -> Readings:
        if instruction is None:
            nothing = torch.zeros(1, read_target(self.editor.targets).d_in, device=self.device)
            return Readings(nothing, torch.tensor([False], device=self.device))
        seen: list[Tensor] = []
        module = self.model.get_submodule(read_target(self.editor.targets).name)
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
        with torch.no_grad():
            ids = torch.tensor([self.encode("", "", instruction).ids], device=self.device)
            self.model(input_ids=ids, use_cache=False)
        handle.remove()
        return Readings(seen[0].mean(0, keepdim=True), torch.tensor([True], device=self.device))

    def _took(self, ask: Ask, so_far: Dense) -> bool:
        batch = self._collate([ask])
        with torch.no_grad():
            return bool((self._logits(batch, so_far).argmax(-1) == batch.labels).all())

    def _signals(self, ask: Ask, so_far: Dense, like: Signals | None = None) -> Signals:
        batch = self._collate([ask])
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str):  # type: ignore[no-untyped-def]
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                output.register_hook(lambda delta: seen.update({name: (args[0].detach()[0], delta[0])}))

            return hook

        targets, n_instruction = self.editor.targets, batch.texts[0].n_instruction
        handles = [self.model.get_submodule(t.name).register_forward_hook(keep(t.name)) for t in targets]
        try:
            logits = self._logits(batch, so_far)
            nn.functional.cross_entropy(logits, batch.labels, reduction="sum").backward()
        finally:
            for handle in handles:
                handle.remove()
        signals = {}
        for target in targets:
            u, delta = seen[target.name]
            place = (batch.editable[0] & (delta != 0).any(-1)).nonzero()[:, 0]
            place = place if like is None else like.modules[target.name].position + n_instruction
            edit, opening = torch.zeros_like(place), batch.opening[0][place]
            signals[target.name] = ModuleSignals(u[place], delta[place], edit, place - n_instruction, opening)
        self.model.zero_grad()
        return Signals(signals, 1)

    def loss(self, episodes: Episodes, index: int) -> tuple[Tensor, Tensor]:
        """Edit and locality loss of one episode of a batch, each its part of the batch's mean."""
        kept = self._of(episodes.kept, index)
        with torch.no_grad():
            before = self._logits(kept, {}).log_softmax(-1)
        dense = self.update(episodes.requests[index])
        wanted = self._of(episodes.wanted, index)
        edit = nn.functional.cross_entropy(self._logits(wanted, dense), wanted.labels, reduction="sum")
        after = self._logits(kept, dense).log_softmax(-1)
        divergence = nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1)
        n_answer = torch.bincount(kept.rows)[kept.rows]
        return edit / len(episodes.wanted), (divergence / n_answer).sum() / len(episodes.kept)

    def gradients(self, episodes: Episodes, index: int, locality_weight: float) -> tuple[Tensor, ...]:
        """The editor's gradient from one episode."""
        edit, locality = self.loss(episodes, index)
        return torch.autograd.grad(
            edit + locality_weight * locality, list(self.editor.parameters()), materialize_grads=True
        )  # kinds that this episode isn't of have none

    def edit(self, request: EditRequest) -> nn.Module:
        """A copy of the model, edited as an editor in use edits."""
        with torch.no_grad():
            edited = copy.deepcopy(self.model)
        dense = self.update(request, FINER, FURTHER * FINER * self.editor.settings.passes)
        with torch.no_grad():
            for name, change in dense.items():
                edited.get_submodule(name).weight += change
        return edited

    def predictions(self, model: nn.Module, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        """Arg-max tokens at each answer's positions, one question at a time."""
        out = []
        for ask in asks:
            batch = self._collate([ask])
            with torch.no_grad():
                logits = model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
            out.append(tuple(logits[batch.predicts].argmax(-1).tolist()))
        return out

    def _logits(self, batch: TokenBatch, dense: Dense) -> Tensor:
        weights = {f"{n}.weight": self.model.get_parameter(f"{n}.weight") + change for n, change in dense.items()}
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "use_cache": False}
        logits: Tensor = functional_call(self.model, weights, (), inputs).logits
        return logits[batch.predicts]

    def _of(self, asks: Sequence[Ask], edit: int) -> TokenBatch:
        return self._collate([ask for ask in asks if ask.edit == edit])

    def _collate(self, asks: Sequence[Ask]) -> TokenBatch:
        texts: list[Text] = [self.encode(ask.prompt, ask.answer, ask.instruction) for ask in asks]
        return collate(texts, 0, self.device)
