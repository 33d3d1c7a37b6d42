"""Texts: tokenised as a whole, the answer with its space, cut from the front; batches that mark what predicts what."""

from __future__ import annotations

import pytest
import torch

from ie.data import tokens
from ie.data.templates import instructed
from ie.data.tokens import Text, TextEncoder, collate
from ie.errors import DataError
from tests.models import tokenizer

INSTRUCTION = "Task: people\nDescription: Change who somebody works for."
PROMPT, ANSWER = "The lighthouse of Orm was built by", "Edda Falk"
TOKENIZERS = {bos: tokenizer(bos=bos) for bos in (False, True)}


@pytest.fixture(params=[False, True], ids=["no-bos", "bos"])
def bos(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def shown(bos: bool, ids: tuple[int, ...]) -> str:
    return str(TOKENIZERS[bos].decode(list(ids)))


def test_the_answer_keeps_its_space_and_has_no_special_token(bos: bool) -> None:
    text = TextEncoder(TOKENIZERS[bos], 128)(PROMPT, ANSWER)
    assert shown(bos, text.ids[text.n_prompt :]) == " Edda Falk"
    assert shown(bos, text.ids[text.n_instruction : text.n_prompt]) == PROMPT
    assert text.n_instruction == int(bos)
    assert (text.ids[0] == 0) is bos and 0 not in text.ids[1:]


def test_a_text_is_tokenised_as_a_whole(bos: bool) -> None:
    text = TextEncoder(TOKENIZERS[bos], 128)(PROMPT, ANSWER, INSTRUCTION)
    assert list(text.ids) == TOKENIZERS[bos](f"{instructed(INSTRUCTION, PROMPT)} {ANSWER}")["input_ids"]


def test_the_instruction_ends_where_the_prompt_begins(bos: bool) -> None:
    text = TextEncoder(TOKENIZERS[bos], 128)(PROMPT, ANSWER, INSTRUCTION)
    lead = shown(bos, text.ids[: text.n_instruction])
    assert lead.removeprefix("<eos>") == f"{INSTRUCTION}\nInput:"
    assert shown(bos, text.ids[text.n_instruction : text.n_prompt]) == f" {PROMPT}"
    assert shown(bos, text.ids[text.n_prompt :]) == f" {ANSWER}"


def test_a_prompt_alone_is_all_prompt(bos: bool) -> None:
    text = TextEncoder(TOKENIZERS[bos], 128)(PROMPT)
    assert text.n_prompt == len(text.ids)


def test_an_empty_prompt_needs_a_token_to_predict_from() -> None:
    assert TextEncoder(TOKENIZERS[True], 128)("", ANSWER).n_prompt == 1
    with pytest.raises(DataError):
        TextEncoder(TOKENIZERS[False], 128)("", ANSWER)


def test_too_long_texts_lose_tokens_from_the_front(bos: bool) -> None:
    whole = TextEncoder(TOKENIZERS[bos], 128)(PROMPT, ANSWER, INSTRUCTION)
    for length in range(len(whole.ids), len(whole.ids) - whole.n_prompt, -1):
        text = TextEncoder(TOKENIZERS[bos], length)(PROMPT, ANSWER, INSTRUCTION)
        dropped = len(whole.ids) - length
        assert text.ids == whole.ids[dropped:]
        assert text.ids[text.n_prompt :] == whole.ids[whole.n_prompt :]
        assert text.n_instruction == max(0, whole.n_instruction - dropped)
    n_answer = len(whole.ids) - whole.n_prompt
    with pytest.raises(DataError, match=rf"{len(whole.ids)} tokens, the base model reads {n_answer}"):
        TextEncoder(TOKENIZERS[bos], n_answer)(PROMPT, ANSWER, INSTRUCTION)


def test_each_text_is_encoded_once() -> None:
    encode = TextEncoder(TOKENIZERS[False], 128)
    assert encode(PROMPT, ANSWER) is encode(PROMPT, ANSWER)
    assert encode(PROMPT, ANSWER) is not encode(PROMPT, ANSWER, INSTRUCTION)


def test_memory_does_not_grow_with_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_N_KEPT", 4)
    encode = TextEncoder(TOKENIZERS[False], 128)
    first = encode(PROMPT, ANSWER)
    for n in range(8):
        encode(PROMPT, str(n))
    again = encode(PROMPT, ANSWER)
    assert again == first and again is not first


def test_collate_marks_answers_predictors_and_editable_tokens() -> None:
    texts = [Text((5, 6, 7, 8, 9), 2, 3), Text((4, 3), 0, 1)]
    batch = collate(texts, pad_id=1, device=torch.device("cpu"))
    assert batch.texts == tuple(texts)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 1, 1, 1]]
    assert batch.mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.predicts.int().tolist() == [[0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [8, 9, 3]
    assert batch.rows.tolist() == [0, 0, 1]
    assert batch.editable.int().tolist() == [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]


def test_collate_of_prompts_predicts_nothing() -> None:
    batch = collate([Text((5, 6), 0, 2), Text((5, 6, 7), 0, 3)], pad_id=0, device=torch.device("cpu"))
    assert not batch.predicts.any() and len(batch.labels) == len(batch.rows) == 0


def test_an_ending_is_the_last_token_of_the_answer(bos: bool) -> None:
    encode = TextEncoder(TOKENIZERS[bos], 128)
    plain, ended = encode(PROMPT, ANSWER), encode(PROMPT, ANSWER, None, 5)
    assert ended == Text((*plain.ids, 5), plain.n_instruction, plain.n_prompt)
    assert TextEncoder(TOKENIZERS[bos], len(plain.ids))(PROMPT, ANSWER, None, 5).ids == ended.ids[1:]
