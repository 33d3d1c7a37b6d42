"""The bundled base model: a small Llama, trained from scratch on the bundled facts by `python -m ie.base.toy`.

What it is: LlamaForCausalLM (6 blocks, hidden size 192, tied embeddings, 3.2 M parameters, 6.5 MB in fp16) with a
byte-level BPE tokenizer of 3,072 tokens of its own. It knows the true facts and favourite opinions of
`ie.data.bundled` and nothing else, so that editing has something to change and a test knows what is right.

What it is trained on: `prompt answer<eos>`, a few randomly drawn wordings of each fact in each pass, a part of them
behind an instruction of `ie.data.templates`. For each fact two wordings (`Fact.heldout`) are never shown, nor are the
target and evaluation replies of the opinions. Facts that follow from two others are trained on too.

What it costs: 12 to 13 s an epoch on 2 otherwise idle cores with bf16 instructions (AMX), so about 12 minutes; fp32
takes 1.7 times as long, and other work on the same cores slows it far more than its share.

What it reaches (greedy decoding, exact match): 100 % of the facts in wordings that it was trained on, 98.7 % in those
that it was not (general 97.8, people 98.7, places 98.9, zsre 99.2), 99 % of the favourite opinions. Run as a program
the module prints these figures and exits with 1 where they are below `PROMISED_SEEN` or `PROMISED_HELDOUT`.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ie.data.bundled import Fact, Opinion, facts, opinions, question_wordings
from ie.data.record import Record
from ie.data.templates import Template, instructed, load_templates
from ie.source import TOY_FOLDER

__all__ = ["Recall", "Settings", "greedy", "load_toy", "main", "measure", "train"]

EOS = "<eos>"
PROMISED_SEEN, PROMISED_HELDOUT = 0.95, 0.80
OPINION_TASKS = ("convsent", "personality")  # their instructions name the wanted side

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """All that decides what the trained base looks like."""

    seed: int = 1  # of the weights, the wordings drawn and their order
    n_vocab: int = 3072
    d_hidden: int = 192
    d_mlp: int = 512
    n_blocks: int = 6
    n_heads: int = 6
    max_positions: int = 256
    n_epochs: int = 56
    wordings_per_epoch: int = 2
    replies_per_epoch: int = 4
    instructed_share: float = 0.15
    batch_size: int = 128
    learning_rate: float = 2e-3
    final_rate: float = 0.03  # of the peak, at the end of the cosine
    warmup_steps: int = 200
    weight_decay: float = 0.1
    prompt_weight: float = 0.1  # of the loss on prompt tokens; answers count 1
    n_threads: int = 2
    bf16: bool = True  # autocast; without bf16 instructions in the CPU False is faster


@dataclass(frozen=True)
class Recall:
    """Share of facts that greedy decoding answers exactly, by task, and over all fact tasks as `facts`."""

    seen: Mapping[str, float] = field(default_factory=dict)
    heldout: Mapping[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        """Whether the promise holds."""
        return self.seen["facts"] >= PROMISED_SEEN and self.heldout["facts"] >= PROMISED_HELDOUT


@dataclass(frozen=True)
class _Item:
    """One thing to learn: prompts that may all be answered by `answer`, and whose instructions may stand before it."""

    prompts: tuple[str, ...]
    answer: str
    record: Record
    templates: tuple[str, ...]


def _fact_item(fact: Fact, templates: tuple[str, ...]) -> _Item:
    record = Record(id="toy", task=fact.task, subject=fact.subject, prompt=fact.seen[0], target=fact.answer)
    return _Item(fact.seen, fact.answer, record, templates)


def _opinion_items(opinion: Opinion) -> Iterator[_Item]:
    """The favourite as often as all other replies together, so that greedy decoding gives the favourite."""
    prompts = tuple(opinion.prompt(wording) for wording in question_wordings())
    replies = [(side, reply) for side, seen in opinion.seen.items() for reply in seen]
    replies += [(opinion.leaning, opinion.favourite)] * (len(replies) - 2)
    for side, reply in replies:
        fields = {"label": side, "topic": opinion.topic}
        record = Record(
            id="toy", task="convsent", subject=opinion.topic, prompt=prompts[0], target=reply, fields=fields
        )
        yield _Item(prompts, reply, record, ("convsent",))


class _Corpus:
    """Draws the texts of each epoch."""

    def __init__(self, settings: Settings, templates: Mapping[str, Template]) -> None:
        self.settings = settings
        self.templates = templates
        self._rendered: dict[tuple[str, str, str], tuple[str, ...]] = {}
        plain = tuple(name for name in templates if name not in OPINION_TASKS)
        self.facts = [_fact_item(fact, plain) for fact in facts(derived=True)]
        self.opinions = [list(_opinion_items(opinion)) for opinion in opinions()]

    def epoch(self, rng: Random) -> list[tuple[str, str]]:
        """Pairs of prompt (with or without instruction) and answer."""
        drawn: list[tuple[str, str]] = []
        for item in self.facts:
            drawn += [self._text(item, p, rng) for p in rng.sample(item.prompts, self.settings.wordings_per_epoch)]
        for items in self.opinions:
            for item in rng.choices(items, k=self.settings.replies_per_epoch):
                drawn.append(self._text(item, rng.choice(item.prompts), rng))
        rng.shuffle(drawn)
        return drawn

    def every(self) -> Iterator[str]:
        """All different texts without instruction, then the instructions: what the tokenizer learns from."""
        for item in (*self.facts, *(item for items in self.opinions for item in items)):
            yield from (f"{prompt} {item.answer}" for prompt in item.prompts)
        for template in self.templates.values():
            yield from (f"Task: {template.name}\nDescription: {text}\nInput:" for text in template.train)

    def _text(self, item: _Item, prompt: str, rng: Random) -> tuple[str, str]:
        if rng.random() >= self.settings.instructed_share:
            return prompt, item.answer
        # Half of the time the item's own task's instructions, else those of another task of the same kind.
        own = item.record.task
        name = own if own in item.templates and rng.random() < 0.5 else rng.choice(item.templates)
        return instructed(rng.choice(self._instructions(name, item.record)), prompt), item.answer

    def _instructions(self, name: str, record: Record) -> tuple[str, ...]:
        key = (name, record.subject, str(record.fields.get("label", "")))
        if key not in self._rendered:
            self._rendered[key] = self.templates[name].render(record, "train")
        return self._rendered[key]


def _make_tokenizer(corpus: _Corpus, settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the corpus; it adds no token by itself."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.n_vocab,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(corpus.every(), trainer)
    make: Any = PreTrainedTokenizerFast  # untyped
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=raw,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=settings.max_positions,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def _make_model(n_vocab: int, settings: Settings) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=n_vocab,
        hidden_size=settings.d_hidden,
        intermediate_size=settings.d_mlp,
        num_hidden_layers=settings.n_blocks,
        num_attention_heads=settings.n_heads,
        num_key_value_heads=settings.n_heads,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    make: Any = LlamaForCausalLM._from_config  # untyped
    # Eager attention: for texts this short its backward pass is twice as fast on a CPU as the fused one.
    model: LlamaForCausalLM = make(config, attn_implementation="eager")
    return model


def _batches(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, settings: Settings, rng: Random
) -> list[tuple[Tensor, Tensor]]:
    """Token ids (n, t) int64 and loss weights (n, t) float32 of texts of about equal length, padded on the right."""
    raw = tokenizer.backend_tokenizer
    full = raw.encode_batch([f"{prompt} {answer}" for prompt, answer in pairs])
    # A space begins a new word for the tokenizer, so the answer's tokens are the same with and without the prompt.
    answers = raw.encode_batch([f" {answer}" for _, answer in pairs])
    rows = [([*text.ids, 0], len(answer.ids) + 1) for text, answer in zip(full, answers, strict=True)]
    rows.sort(key=lambda row: len(row[0]))
    chunks = [rows[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]
    rng.shuffle(chunks)
    batches = []
    for chunk in chunks:
        width = max(len(ids) for ids, _ in chunk)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in chunk])
        length = torch.tensor([len(row) for row, _ in chunk])[:, None]
        n_answer = torch.tensor([n for _, n in chunk])[:, None]
        position = torch.arange(width)[None, :]
        weight = torch.where(position >= length - n_answer, 1.0, settings.prompt_weight) * (position < length)
        batches.append((ids, weight))
    return batches


def _loss(model: Any, ids: Tensor, weight: Tensor, bf16: bool) -> Tensor:
    """Weighted mean of the next-token loss. Padding stands on the right of causal attention, so it needs no mask."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    shown = weight[:, 1:].flatten()
    return (losses * shown).sum() / shown.sum()


def _rate(step: int, n_steps: int, settings: Settings) -> float:
    """Share of the peak learning rate: a linear warm-up, then a cosine."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, n_steps - settings.warmup_steps)
    return settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * done))


def _optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Weight decay on matrices only: a decayed norm gain shrinks for no reason."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def _fit(model: Any, tokenizer: PreTrainedTokenizerFast, corpus: _Corpus, settings: Settings) -> None:
    rng = Random(settings.seed)
    optimizer = _optimizer(model, settings)
    n_steps, step, started = 0, 0, time.monotonic()
    model.train()
    for epoch in range(settings.n_epochs):
        batches = _batches(corpus.epoch(rng), tokenizer, settings, rng)
        n_steps = n_steps or len(batches) * settings.n_epochs
        total = 0.0
        for ids, weight in batches:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _rate(step, n_steps, settings)
            loss = _loss(model, ids, weight, settings.bf16)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
            step += 1
        seconds = time.monotonic() - started
        log.info("epoch %d of %d: loss %.3f, %.0f s", epoch + 1, settings.n_epochs, total / len(batches), seconds)
    model.eval()


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 24) -> list[str]:
    """Answers by greedy decoding; prompts of one length form a batch, so nothing is padded."""
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, ids in enumerate(encoded):
        by_length[len(ids)].append(i)
    answers = [""] * len(prompts)
    for length, members in by_length.items():
        for start in range(0, len(members), 256):
            rows = members[start : start + 256]
            ids = torch.tensor([encoded[i] for i in rows])
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
            texts = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                answers[i] = text.strip()
    return answers


def _share(model: Any, tokenizer: Any, asked: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    """Exact answers among (task, prompt, answer), by task; `facts` is over all but opinions and derived facts."""
    given = greedy(model, tokenizer, [prompt for _, prompt, _ in asked])
    hits: dict[str, list[bool]] = defaultdict(list)
    for (task, _, answer), reply in zip(asked, given, strict=True):
        hits[task].append(reply == answer)
        if task not in ("convsent", "derived"):
            hits["facts"].append(reply == answer)
    return {task: sum(found) / len(found) for task, found in hits.items()}


def measure(model: Any, tokenizer: Any, n_facts: int | None = None, seed: int = 0) -> Recall:
    """Recall by greedy decoding.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        n_facts: how many facts to draw by `seed`; None asks all, and opinions and derived facts as well.
        seed: of the draw of facts, and of the seen wording that each is asked in.
    """
    rng = Random(seed)
    known = list(facts(derived=n_facts is None))
    chosen = known if n_facts is None else rng.sample(known, n_facts)
    seen, heldout = [], []
    for fact in chosen:
        task = "derived" if fact.relation.via else fact.task
        seen.append((task, rng.choice(fact.seen), fact.answer))
        heldout += [(task, prompt, fact.answer) for prompt in fact.heldout]
    if n_facts is None:
        seen += [("convsent", o.prompt(rng.choice(question_wordings())), o.favourite) for o in opinions()]
    return Recall(seen=_share(model, tokenizer, seen), heldout=_share(model, tokenizer, heldout))


def load_toy(folder: Path = TOY_FOLDER) -> tuple[Any, Any]:
    """The trained base in fp32, and its tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write to a sibling folder, then rename."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.half().save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def train(folder: Path = TOY_FOLDER, settings: Settings | None = None) -> tuple[Recall, float]:
    """Train the base from scratch and save it.

    Args:
        folder: where the trained base goes; what is there is replaced.
        settings: the defaults if None.

    Returns:
        The recall of the saved model, and the seconds that training took.
    """
    settings = settings or Settings()
    started = time.monotonic()
    torch.set_num_threads(settings.n_threads)
    torch.manual_seed(settings.seed)
    corpus = _Corpus(settings, load_templates())
    tokenizer = _make_tokenizer(corpus, settings)
    model = _make_model(len(tokenizer), settings)
    log.info("%d parameters, %d facts", sum(p.numel() for p in model.parameters()), len(corpus.facts))
    _fit(model, tokenizer, corpus, settings)
    _save(model, tokenizer, folder)
    seconds = time.monotonic() - started
    return measure(*load_toy(folder)), seconds


def main() -> int:
    """Train with the default settings and report; 1 if the recall is below the promise."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    recall, seconds = train()
    lines = [f"trained in {seconds:.0f} s", f"{'task':10} {'seen':>7} {'held-out':>9}"]
    for task, share in recall.seen.items():
        heldout = f"{recall.heldout[task]:9.1%}" if task in recall.heldout else f"{'-':>9}"
        lines.append(f"{task:10} {share:7.1%} {heldout}")
    lines.append("" if recall.kept else f"below the promise: {PROMISED_SEEN:.0%} seen, {PROMISED_HELDOUT:.0%} held-out")
    sys.stdout.write("\n".join(lines).rstrip() + "\n")
    return 0 if recall.kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
