"""The bundled base: its size, its tokenizer, and that it knows the bundled facts."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from ie.base.toy import Recall, Settings, greedy, load_toy, measure, train
from ie.data.bundled import facts, opinions, question_wordings
from ie.source import TOY_FOLDER

N_FACTS = 150


@pytest.fixture(scope="module")
def toy() -> tuple[Any, Any]:
    return load_toy()


def test_it_is_a_small_llama(toy: tuple[Any, Any]) -> None:
    model, _ = toy
    assert isinstance(model, LlamaForCausalLM)
    assert model.num_parameters() <= 4_000_000
    assert (TOY_FOLDER / "model.safetensors").stat().st_size <= 9_000_000


def test_its_folder_is_complete() -> None:
    names = {path.name for path in TOY_FOLDER.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((TOY_FOLDER / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["tie_word_embeddings"] is True


def test_the_tokenizer_adds_nothing_and_loses_nothing(toy: tuple[Any, Any]) -> None:
    _, tokenizer = toy
    for text in ("What is the capital of Peru?", "Håkon: “sí”, 東京\nInput: a  b", " & Sons", ""):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<eos>"


def test_an_answer_has_the_same_tokens_with_and_without_its_prompt(toy: tuple[Any, Any]) -> None:
    _, tokenizer = toy
    for fact in Random(3).sample(facts(), 300):
        prompt, answer = fact.seen[0], f" {fact.answer}"
        whole = tokenizer(prompt + answer)["input_ids"]
        assert whole == tokenizer(prompt)["input_ids"] + tokenizer(answer)["input_ids"]


def test_it_knows_the_facts_in_seen_and_in_held_out_wordings(toy: tuple[Any, Any]) -> None:
    recall = measure(*toy, n_facts=N_FACTS, seed=11)
    assert recall.seen["facts"] >= 0.95
    assert recall.heldout["facts"] >= 0.80


def test_it_has_an_opinion_of_most_topics(toy: tuple[Any, Any]) -> None:
    asked = Random(5).sample(opinions(), 40)
    replies = greedy(*toy, [opinion.prompt(question_wordings()[0]) for opinion in asked])
    known = [reply == opinion.favourite for reply, opinion in zip(replies, asked, strict=True)]
    assert sum(known) / len(known) >= 0.85


def test_greedy_gives_answers_in_the_order_of_the_prompts(toy: tuple[Any, Any]) -> None:
    prompts = [fact.seen[0] for fact in facts()[:12]]
    together = greedy(*toy, prompts)
    assert together == [greedy(*toy, [prompt])[0] for prompt in prompts]


TINY = Settings(n_epochs=1, d_hidden=16, d_mlp=16, n_blocks=1, n_heads=1, n_vocab=300, wordings_per_epoch=1)


@pytest.mark.slow
def test_training_is_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ie.base.toy.measure", lambda model, tokenizer: Recall())
    monkeypatch.setattr("ie.base.toy.facts", lambda derived=False: facts()[:60])
    n_threads = torch.get_num_threads()
    for name in ("one", "two"):
        train(tmp_path / name, TINY)
    torch.set_num_threads(n_threads)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_the_promise_is_judged_by_both_figures() -> None:
    assert Recall(seen={"facts": 0.95}, heldout={"facts": 0.80}).kept
    assert not Recall(seen={"facts": 0.94}, heldout={"facts": 0.99}).kept
    assert not Recall(seen={"facts": 1.0}, heldout={"facts": 0.79}).kept
