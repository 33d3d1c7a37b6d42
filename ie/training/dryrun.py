"""What a training would do: its settings, its edit targets, the memory and the time it needs; nothing is loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from ie.base.plan import Plan, is_here, meta_model, plan_load
from ie.base.precision import product_seconds, with_faster_dtype
from ie.base.targets import EditTarget, find_blocks, find_targets
from ie.editor.passes import finer_in_use
from ie.training.memory import estimate_memory
from ie.training.settings import TrainSettings

__all__ = ["dry_run"]

_PLAIN_TOKENS, _INSTRUCTED_TOKENS, _ANSWER_TOKENS = 12, 54, 3  # of a text of usual length
_N_TOKENS, _LARGEST = 256, 2048  # of the product that is timed: larger ones are no faster, and take seconds
_REACHED = 0.5  # share of a product's rate that training reaches (benchmarks/README.md, row f)
_REST_S = 0.2  # a step's time beside matrix products: the bundled base's steps have little else


def dry_run(settings: TrainSettings) -> dict[str, Any]:
    """The JSON object of `ie train --dry-run`.

    Raises:
        ModelError: if the base's configuration cannot be read, or nothing in it can be edited.
    """
    plan = plan_load(settings.quant, settings.dtype, settings.device)
    if settings.dtype == "auto":
        plan = with_faster_dtype(plan, settings.model)
    model = meta_model(settings.model)
    targets = find_targets(model)
    return {
        "config": settings.model_dump(mode="json", exclude={"force", "resume"}),
        "targets": [target.name for target in targets],
        "device": str(plan.device),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "quant": plan.quant,
        "reason": plan.reason,
        "memory_estimate": estimate_memory(settings.model, plan, settings),
        "seconds_estimate": _seconds(model, targets, plan, settings) if is_here(plan.device) else None,
    }


def _seconds(model: nn.Module, targets: tuple[EditTarget, ...], plan: Plan, settings: TrainSettings) -> float:
    """Steps and validations, every text met for the first time, from the rate of a matrix product timed here."""
    largest = max(targets, key=lambda one: one.d_in * one.d_out)
    d_in, d_out = min(largest.d_in, _LARGEST), min(largest.d_out, _LARGEST)
    rate = _REACHED * 2 * _N_TOKENS * d_in * d_out / product_seconds(plan.dtype, d_in, d_out, plan.device, _N_TOKENS)
    _, blocks = find_blocks(model)
    of_block = sum(p.numel() for p in blocks.parameters()) / len(blocks)
    n_suffix = len(blocks) - targets[0].block
    n_head: int = model.get_output_embeddings().weight.numel()  # type: ignore[operator]

    def products(n_requests: float, n_plain: float, n_instructed: float, backward: int, passes: int) -> float:
        n_asked = n_plain * _PLAIN_TOKENS + n_instructed * _INSTRUCTED_TOKENS
        n_edited = n_requests * (_INSTRUCTED_TOKENS + passes * _PLAIN_TOKENS)
        prefix = targets[0].block * of_block * (n_requests * (_INSTRUCTED_TOKENS + _PLAIN_TOKENS) + n_asked)
        suffix = n_suffix * of_block * (2 * n_edited + (1 + backward) * n_asked)  # signals always go backward
        head = n_head * _ANSWER_TOKENS * (n_requests + (1 + backward) * (n_plain + n_instructed))
        return 2 * (prefix + suffix + head)

    n, plain = settings.batch_size, settings.plain_share
    of_step = products(n, n * (2 * plain + 1 + settings.n_negatives), n * 2 * (1 - plain), 1, settings.passes)
    in_use = settings.passes * finer_in_use(settings.method, settings.passes)
    of_validation = products(settings.n_validation, 8 * settings.n_validation, 0, 0, in_use)
    n_validations = 1 + settings.steps // settings.validate_every
    total = (settings.steps * of_step + n_validations * of_validation) / rate + settings.steps * _REST_S
    return float(total if settings.minutes is None else min(total, 60 * settings.minutes))
