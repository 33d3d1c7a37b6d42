"""Speed and memory against a plain reference: (a) to (g) of `python -m benchmarks`.

On a GPU, if there is one. Bases are not quantised, since the reference's is not; `benchmarks.large` measures in 8 bits.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import gpt2_small, llama, save
from benchmarks.reference import Reference
from benchmarks.timing import alternating, seconds
from benchmarks.workload import SETTINGS, Training, draw_episodes, moved_editor, regroup
from ie.base.asking import Ask
from ie.base.load import load_base
from ie.base.model import Base
from ie.base.targets import is_transposed
from ie.base.update import Update, adding
from ie.data.dataset import Dataset
from ie.data.record import Record
from ie.editor.methods import editor_method
from ie.editor.passes import propose
from ie.editor.request import EditRequest
from ie.evaluation.protocol import is_opinion, measure
from ie.evaluation.respondent import Respondent
from ie.patch.lowrank import stack
from ie.patch.stacking import on_device
from ie.training.episodes import Episodes

__all__ = ["MEASUREMENTS"]

Row = dict[str, Any]
_N_BATCHES = 6
_N_REGROUPED = 3
_N_EDITS = 10
_N_EVALUATED, _N_REFERENCE_EVALUATED = 100, 8
_RANK = 16
_METRICS = ("reliability", "generalization", "locality")


def check_equal(folder: Path, data: Path) -> Row:
    """(a) beforehand: in fp32 our update and loss are the reference's, to 1e-4."""
    base, episodes = _load(folder, "float32"), draw_episodes(data, 1)[0]
    training = Training(base, moved_editor(base, [episodes]))
    reference = Reference(folder, training.editor)
    with torch.no_grad():
        _, update = propose(base, training.editor, episodes.requests)
    worst = 0.0
    for name, dense in reference.update(episodes.requests[0]).items():
        a, b = update[name]
        ours = torch.einsum("ri,ro->io", a[0], b[0])
        ours = ours if is_transposed(base.model.get_submodule(name)) else ours.T
        worst = max(worst, ((ours - dense).norm() / dense.norm()).item())
    losses = [reference.loss(episodes, index) for index in range(len(episodes.requests))]
    theirs = [sum(part.item() for part in column) for column in zip(*losses, strict=True)]
    found = training.step(episodes)
    for ours_loss, their_loss in zip((found.edit, found.locality), theirs, strict=True):
        worst = max(worst, abs(ours_loss.item() - their_loss) / max(abs(their_loss), 1e-3))
    if worst > 1e-4:
        raise AssertionError(f"update or loss differs from the reference's by {worst:.1e}")
    return {"largest relative difference of update and loss": worst}


def training(folder: Path, data: Path) -> Row:
    """(a) Seconds per training episode: reference, ours in the first pass, ours once the prefix is kept."""
    first = draw_episodes(data, _N_BATCHES + 1)
    again = regroup(first)
    editors = [moved_editor(_load(folder), first) for _ in range(2)]
    base, reference = _load(folder), Reference(folder, editors[1])  # one that has read no instruction
    ours = Training(base, editors[0])
    ours.step(first.pop(0))  # warm-up
    again.pop(0)
    weight = SETTINGS.locality_weight
    fresh, plain = alternating(
        [lambda e=e: ours.step(e) for e in first],  # type: ignore[misc]
        [lambda e=e: [reference.gradients(e, i, weight) for i in range(2)] for e in first],  # type: ignore[misc]
    )
    kept, plain_again = alternating(
        [lambda e=e: ours.step(e) for e in again],  # type: ignore[misc]
        [lambda e=e: [reference.gradients(e, i, weight) for i in range(2)] for e in again],  # type: ignore[misc]
    )
    size = SETTINGS.batch_size
    return {
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "reference_s": (plain + plain_again) / 4,
        "first_pass_s": fresh / size,
        "kept_s": kept / size,
        "first_pass_ratio": (plain / 2) / (fresh / size),
        "kept_ratio": (plain_again / 2) / (kept / size),
    }


def single_edit(folder: Path, data: Path) -> Row:
    """(b) Seconds from a request that was never seen to an edited model."""
    episodes = draw_episodes(data, 1)
    editor = moved_editor(_load(folder), episodes)
    base, reference, method = _load(folder), Reference(folder, editor), editor_method(editor)  # one that has read none
    requests = [request for batch in episodes for request in batch.requests][: _N_EDITS + 1]
    method(base, [requests[-1]])
    ours, plain = alternating(
        [lambda r=r: method(base, [r]) for r in requests[:_N_EDITS]],  # type: ignore[misc]
        [lambda r=r: reference.edit(r) for r in requests[:_N_EDITS]],  # type: ignore[misc]
    )
    return {"reference_s": plain, "ours_s": ours, "ratio": plain / ours}


def evaluation(folder: Path, data: Path) -> Row:
    """(c) Seconds per edit: made, then edit prompt, rephrase and locality asked before and after."""
    editor = moved_editor(_load(folder), draw_episodes(data, 4))
    base, reference, method = _load(folder), Reference(folder, editor), editor_method(editor)
    usable = [r for r in Dataset.load(data).records("train") if r.rephrases and r.locality and not is_opinion(r)]
    records = [
        r.model_copy(update={"rephrases": r.rephrases[:1], "locality": r.locality[:1]})
        for r in random.Random(0).sample(usable, _N_EVALUATED)
    ]

    def ours(part: list[Record]) -> None:
        before = Respondent(base)
        for start in range(0, len(part), 32):
            some = part[start : start + 32]
            told = [record.instruction.train[0] for record in some]
            update = method(base, [EditRequest.of(r, text) for r, text in zip(some, told, strict=True)])
            for edited in (None, update):
                measure(base, some, told, edited, generate=False, queries=("plain",), metrics=_METRICS, before=before)

    def plain(record: Record) -> None:
        asks = [
            Ask(record.prompt, record.target),
            Ask(record.rephrases[0], record.target),
            Ask(record.locality[0].prompt, record.locality[0].answer),
        ]
        reference.predictions(reference.model, asks)
        edited = reference.edit(EditRequest.of(record, record.instruction.train[0]))
        reference.predictions(edited, asks)

    method(base, [EditRequest.of(records[0], None)])
    half = _N_REFERENCE_EVALUATED // 2
    theirs = [seconds(lambda r=r: plain(r)) for r in records[:half]]  # type: ignore[misc]
    whole = seconds(lambda: ours(records)) / len(records)
    theirs += [seconds(lambda r=r: plain(r)) for r in records[half : 2 * half]]  # type: ignore[misc]
    return {"reference_s": statistics.median(theirs), "ours_s": whole, "ratio": statistics.median(theirs) / whole}


def memory(folder: Path, data: Path) -> Row:
    """(d) Peak resident memory of a process that trains: ours, the reference, the reference with the paper's rank."""
    peaks = {}
    for side in ("ours", "reference", "reference-1920"):
        command = [sys.executable, "-m", "benchmarks.memory", side, str(folder), str(data)]
        peaks[side] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["peak_bytes"]
    return {
        "ours_mb": peaks["ours"] / 1e6,
        "reference_mb": peaks["reference"] / 1e6,
        "share": peaks["ours"] / peaks["reference"],
        "reference_paper_rank_mb": peaks["reference-1920"] / 1e6,
        "share_of_paper_rank": peaks["ours"] / peaks["reference-1920"],
    }


def depth(place: Path, tokenizer: Path, data: Path) -> Row:
    """(e) Seconds per episode with 12, 24 and 48 blocks, the prefix kept."""
    batches = draw_episodes(data, 4)
    runs = []
    for n_blocks in (12, 24, 48):
        base = _load(save(gpt2_small(n_blocks), tokenizer, place / f"gpt2-{n_blocks}"))
        run = Training(base, moved_editor(base, batches))
        for batch in batches:
            run.step(batch)
        runs.append(run)
    again = regroup(batches)
    times = alternating(*[[lambda run=run, e=e: run.step(e) for e in again] for run in runs])  # type: ignore[misc]
    size = SETTINGS.batch_size
    return {
        **{f"{n}_blocks_s": t / size for n, t in zip((12, 24, 48), times, strict=True)},
        "48_over_12": times[2] / times[0],
    }


def matmul_share(place: Path, tokenizer: Path, data: Path) -> Row:
    """(f) Floating-point operations of training's matrix products per second, over the machine's own rate of them."""
    batches = draw_episodes(data, 4)
    base = _load(save(llama(), tokenizer, place / "llama"))
    run = Training(base, moved_editor(base, batches))
    for batch in batches:
        run.step(batch)
    again = [batch for seed in range(_N_REGROUPED) for batch in regroup(batches, seed)]
    dtype, device = run.base.model.dtype, run.base.device
    size = 2048 if device.type == "cpu" else 8192
    left = right = torch.randn(size, size, dtype=dtype, device=device)
    left @ right
    turns = [(seconds(lambda e=e: run.step(e)), seconds(lambda: left @ right)) for e in again]  # type: ignore[misc]
    rate = statistics.median(_flops(run, batch) / time for batch, (time, _) in zip(again, turns, strict=True))
    of_product = [2 * size**3 / time for _, time in turns]
    matmul, best = statistics.median(of_product), max(of_product)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "training": rate,
        "matmul": matmul,
        "share": rate / matmul,
        "best_matmul": best,
        "share_of_best": rate / best,
    }


def _flops(run: Training, batch: Episodes) -> int:
    """Floating-point operations of a step's matrix products."""
    with torch.profiler.profile(with_flops=True) as profile:
        run.step(batch)
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    return sum(event.flops for event in profile.key_averages() if event.key in products)


def patches(folder: Path, data: Path) -> Row:
    """(g) Forward time of 16 texts of 32 tokens under 1, 8 and 64 patches of rank 16, over none."""
    base = _load(folder, "float32")
    ids = torch.randint(0, 3000, (16, 32), generator=torch.Generator().manual_seed(0)).to(base.device)
    edits = [_random_patch(base) for _ in range(64)]
    sides = {n: stack(edits[:n]) for n in (0, 1, 8, 64)}

    def forward(update: Update) -> None:
        with torch.no_grad(), adding(base.model, update) if update else nullcontext():
            base.model(input_ids=ids, use_cache=False)

    forward(sides[0])
    times = alternating(*[[lambda u=u: forward(u)] * 9 for u in sides.values()])  # type: ignore[misc]
    return {f"{n}_patches": time / times[0] for n, time in zip(sides, times, strict=True) if n}


def _random_patch(base: Base) -> Update:
    factors = {t.name: (torch.randn(1, _RANK, t.d_in), 1e-4 * torch.randn(1, _RANK, t.d_out)) for t in base.targets}
    return on_device(base, factors)


def _load(folder: Path, dtype: str = "auto") -> Base:
    return load_base(str(folder), quant="none", dtype=dtype)


MEASUREMENTS = {
    "check": check_equal,
    "a": training,
    "b": single_edit,
    "c": evaluation,
    "d": memory,
    "e": depth,
    "f": matmul_share,
    "g": patches,
}
