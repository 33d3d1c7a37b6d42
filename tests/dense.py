"""Slow references: dense weights, changed and differentiated by plain transformers and autograd."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ie.base import Base
from ie.base.suffix import Decoder
from ie.base.targets import find_blocks
from ie.base.update import Factors, Update
from ie.editor import Editor, EditRequest
from ie.editor.request import collate_requests, plain

__all__ = [
    *("PROMPTS", "dense_gradients", "dense_joint", "dequantised", "edited", "logits_of"),
    *("random_update", "rebased", "state_hash", "tell_apart"),
]

PROMPTS = ("The lighthouse of Orm was built by", "Varn:", "Who wrote the song?")


def logits_of(base: Base, model: nn.Module | None = None) -> Tensor:
    """(n, t, n_vocab), all prompts in one padded batch; of another model in the base's place, if there is one."""
    batch = base.collate([base.encode(prompt) for prompt in PROMPTS])
    with torch.no_grad():
        logits: Tensor = (model or base.model)(
            input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False
        ).logits
    return logits


def tell_apart(base: Base, editor: Editor, *instructions: str) -> None:
    """Let an editor know each of its kinds, if it has any, by one instruction."""
    for kind, instruction in enumerate(instructions):
        if editor.kinds is not None:
            editor.kinds.observe(base.read([instruction]), kind)


def dense_gradients(base: Base, asks: Sequence[tuple[str, str, str | None]]) -> list[dict[str, Tensor]]:
    """For each (prompt, answer, instruction) the gradient of its summed answer loss at every edit target's weight,
    as (d_out, d_in), from a full run of a trainable copy, one text at a time.
    """
    model = copy.deepcopy(base.model).requires_grad_(True)
    out = []
    for prompt, answer, instruction in asks:
        text = base.encode(prompt, answer, instruction)
        ids = torch.tensor([text.ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, text.n_prompt - 1 : -1]
        loss = nn.functional.cross_entropy(logits, ids[0, text.n_prompt :], reduction="sum")
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        modules = {target.name: model.get_submodule(target.name) for target in base.targets}
        out.append({name: _out_in(module, module.weight.grad.clone()) for name, module in modules.items()})  # type: ignore[operator, union-attr]
    return out


def _out_in(module: nn.Module, weight: Tensor) -> Tensor:
    return weight.T if isinstance(module, Conv1D) else weight


def edited(base: Base, update: Mapping[str, Factors], index: int = 0) -> nn.Module:
    """A copy of an unquantised base model with one edit of a batch added to its dense weights."""
    model = copy.deepcopy(base.model)
    for name, (a, b) in update.items():
        module = model.get_submodule(name)
        change = torch.einsum("ri,ro->oi", a[index], b[index])
        module.weight.data += change.T if isinstance(module, Conv1D) else change  # type: ignore[operator]
    return model


def dense_joint(
    base: Base, editor: Editor, requests: Sequence[EditRequest], regularisations: Mapping[str, Any]
) -> dict[str, Tensor]:
    """ΔWᵀ (d_in, d_out) float64 of the joint update, by module path, part of autograd's graph.

    One request at a time, each pass on a dense copy of the model as edited so far, and by the normal equations
    (UᵀU + λ' (WWᵀ)⁻¹) X = UᵀD for whitened inputs UW, X at its full length.
    """
    change: dict[str, Tensor] = {}
    at_first: list[Tensor] = []
    for number in range(editor.settings.passes):
        so_far = {name: (torch.eye(len(one))[None], one.detach().float()[None]) for name, one in change.items()}
        under = rebased(base, edited(base, so_far))
        inputs, values = ({target.name: list[Tensor]() for target in base.targets} for _ in range(2))
        for index, request in enumerate(requests):
            signals = under.signals(collate_requests(base, plain([request])))
            kinds = None if editor.kinds is None else editor.kinds(base.read([request.instruction]))
            update = editor.update(signals, kinds)
            stds = {name: editor.delta_normalisers[name.replace(".", "/")].std for name in update}
            deltas = [signals.modules[name].delta / stds[name] for name in update]  # type: ignore[operator]
            size = torch.cat([delta.flatten() for delta in deltas]).square().mean().sqrt()
            if number == 0:
                at_first.append(size)
            left = min(1.0, float(size / at_first[index]))
            for name, (a, b) in update.items():
                for u, key, value in zip(signals.modules[name].u, a[0], b[0], strict=True):
                    inputs[name].append(u.double())
                    values[name].append(left * (u @ key) * value.double())
        for name in update:
            u, d = torch.stack(inputs[name]), torch.stack(values[name])
            white = editor.whitened(name, torch.eye(u.shape[1])).double()
            damping = regularisations[name] * (u @ white).square().sum() / len(u)
            step = torch.linalg.solve(u.T @ u + damping * torch.linalg.inv(white @ white.T), u.T @ d)
            step = (
                step * (d.norm() / (u @ step).norm()).detach() / (1 + torch.as_tensor(regularisations[name]).detach())
            )
            change[name] = change[name] + step if name in change else step
    return change


def dequantised(exact: Base, quantised: Base) -> Base:
    """The unquantised base with the weights that a quantised load of it stands for."""
    model = copy.deepcopy(exact.model)
    for name, module in quantised.model.named_modules():
        weight = _dequantised_weight(module)
        if weight is not None:
            place = model.get_submodule(name)
            place.weight.data = (weight.T if isinstance(place, Conv1D) else weight).contiguous()
    return rebased(exact, model)


def rebased(base: Base, model: nn.Module) -> Base:
    """The base with another model in its place."""
    decoder = Decoder.split(model, find_blocks(model)[1], base.decoder.first, base.device)
    return replace(base, model=model, decoder=decoder)


def _dequantised_weight(module: Any) -> Tensor | None:
    """(d_out, d_in) float32, or None if the module is not quantised."""
    kind = type(module).__name__
    if kind == "Linear8bitLt":  # a scale for each output, 127 steps
        held = module.weight if module.state.CB is None else module.state  # the first forward run moves them
        weight: Tensor = held.CB.float() * held.SCB[:, None] / 127
        return weight
    if kind == "Linear4bit":
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    return None


def random_update(base: Base, n: int = 1, rank: int = 3, seed: int = 0, size: float = 0.1) -> Update:
    """A random update of every edit target, large enough to change the logits clearly."""
    generator = torch.Generator().manual_seed(seed)
    return {
        t.name: (
            torch.randn(n, rank, t.d_in, generator=generator) / t.d_in**0.5,
            torch.randn(n, rank, t.d_out, generator=generator) * size,
        )
        for t in base.targets
    }


def state_hash(model: nn.Module) -> str:
    """A hash of every bit of a model's state."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(name.encode() + value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
