"""Where a base model ends its answers, and that an edit brings the end about where it does, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ie.base import Base, load_base
from ie.base.asking import Ask, answers, by_length
from ie.base.ending import find_ending
from ie.editor.methods import finetune_method
from ie.editor.request import EditRequest, collate_requests


@pytest.fixture(scope="module")
def toy() -> Base:
    return load_base("toy", quant="none", dtype="float32", device="cpu")


def test_the_bundled_base_ends_its_answers(toy: Base) -> None:
    assert toy.ending == toy.tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_base_that_writes_on_ends_nothing(load: Callable[..., Base], name: str) -> None:
    assert load(name).ending is None


def test_what_follows_every_statement_is_an_ending_only_if_it_ends_something(load: Callable[..., Base]) -> None:
    class Always(torch.nn.Module):
        """A model that writes one token whatever it reads."""

        def __init__(self, token: int) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(token), 256).float())

        def forward(self, input_ids: torch.Tensor) -> object:
            return type("Output", (), {"logits": self.bias.expand(*input_ids.shape, -1)})

    tokenizer = load("gpt2").tokenizer
    assert find_ending(Always(7), tokenizer, lambda token: token == 7) == 7
    assert find_ending(Always(8), tokenizer, lambda token: token == 7) is None


def test_the_ending_is_part_of_what_is_asked_for(toy: Base, load: Callable[..., Base]) -> None:
    request = EditRequest("The capital of France is", "Lima")
    ended, plain = toy.encode(request.prompt, request.target, None, toy.ending), toy.encode(*_words(request))
    assert ended.ids == (*plain.ids, toy.ending) and ended.n_prompt == plain.n_prompt
    assert collate_requests(toy, [request]).texts == (ended,)
    assert collate_requests(load("gpt2"), [request]).texts == (load("gpt2").encode(*_words(request)),)
    [(_, texts)] = by_length(toy, [Ask(*_words(request)), Ask(*_words(request), ended=True)], 64)
    assert texts == [plain, ended]


def test_an_edit_makes_the_base_stop_where_the_target_does(toy: Base) -> None:
    # Half of a name: the base has only ever seen it go on.
    request = EditRequest("The capital of France is", "Lis")
    assert toy.tokenizer.decode(toy.generate([toy.encode(*_words(request))], 4)[0]) != " Lis"
    update = finetune_method(0.6, steps=10)(toy, [request])
    assert answers(toy, [Ask(*_words(request))], update) == ["Lis"]


def _words(request: EditRequest) -> tuple[str, str]:
    return request.prompt, request.target
