"""What is drawn for training: tasks evenly or by size, queries with their edit, instructions where they are read."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from ie.base import Base
from ie.base.asking import Ask
from ie.data.record import Instructions, Question, Record
from ie.editor import Editor, EditorSettings
from ie.editor.passes import observe, propose
from ie.training.episodes import Episodes, Relations, consistent, make_episodes
from ie.training.loss import backward
from ie.training.stream import RecordStream
from tests.dense import edited


def record(n: int, task: str = "people") -> Record:
    return Record(
        id=f"{task}-{n}",
        task=task,
        subject=f"Town {n}",
        prompt=f"The river of Town {n} is the",
        target=f"Ombe {n}",
        ground_truth="Lisse",
        rephrases=(f"Town {n} lies on the", f"Which river has Town {n}?"),
        locality=(Question(prompt=f"The mayor of Village {n} is", answer="Edda"),),
        instruction=Instructions(train=("Task: one", "Task: two"), heldout=("Task: unseen",)),
    )


RECORDS = [record(n) for n in range(40)] + [record(n, "places") for n in range(40, 44)]


def drawn(balance: bool, n: int = 2000) -> Counter[str]:
    stream = RecordStream(RECORDS, balance, random.Random(0))
    return Counter(one.task for one in itertools.islice(stream, n))


def test_balance_draws_tasks_evenly() -> None:
    # Binomial with n 2000 and p 1/2: four standard deviations are 90.
    assert abs(drawn(balance=True)["places"] - 1000) < 90


def test_without_balance_tasks_are_drawn_by_size() -> None:
    # p is 4/44: 182 expected, four standard deviations are 52.
    assert abs(drawn(balance=False)["places"] - 182) < 52


def test_every_record_is_drawn_once_in_a_pass() -> None:
    stream = RecordStream(RECORDS[:40], True, random.Random(0))
    for _ in range(3):
        assert Counter(one.id for one in itertools.islice(stream, 40)) == Counter(one.id for one in RECORDS[:40])


def test_queries_belong_to_their_edit() -> None:
    made = make_episodes(RECORDS[:6], random.Random(0), relations=None, told_share=1.0, plain_share=0.5, n_negatives=2)
    assert len(made.requests) == 6 and len(made.wanted) == 12 and len(made.kept) == 6 * 3
    for edit, one in enumerate(RECORDS[:6]):
        own = [ask for ask in made.wanted if ask.edit == edit]
        assert own[0].prompt == made.requests[edit].prompt != own[1].prompt
        assert {ask.prompt for ask in own} <= {one.prompt, *one.rephrases}
        assert {ask.answer for ask in own} == {one.target}
        kept = [ask for ask in made.kept if ask.edit == edit]
        assert kept[0] == Ask(one.locality[0].prompt, "Edda", None, edit)
        assert all(ask.prompt != one.prompt for ask in kept) and len({ask.prompt for ask in kept}) == 3


def test_the_first_negative_asks_the_same_of_another_subject() -> None:
    far = record(50).model_copy(update={"subject": "Edda", "prompt": "The hat of Edda is", "rephrases": ()})
    made = make_episodes(
        [RECORDS[0], far],
        random.Random(0),
        relations=Relations(RECORDS),
        told_share=1.0,
        plain_share=0.5,
        n_negatives=2,
    )
    of_town, of_edda = ([ask.prompt for ask in made.kept if ask.edit == edit] for edit in (0, 1))
    assert of_town[1] in {one.prompt for one in RECORDS[1:40]}  # of its own task and relation
    assert of_town[2:] == [far.prompt]
    assert of_edda[1:] == [RECORDS[0].prompt]  # nobody else's hat is known, and the batch has one other record


def test_what_is_edited_beside_an_edit_is_not_to_stay() -> None:
    records, options = RECORDS[:8], {"relations": None, "told_share": 1.0, "plain_share": 0.5}
    made = make_episodes(records, random.Random(0), n_negatives=3, **options)
    edited = {record.prompt for record in records}
    for n_sums in (1, 4, 8):
        left = consistent(made, records, n_sums)
        assert (left.requests, left.wanted) == (made.requests, made.wanted)
        for ask in made.kept:
            beside = {record.prompt for edit, record in enumerate(records) if edit % n_sums == ask.edit % n_sums}
            assert (ask in left.kept) is (ask.prompt not in beside)
        n_lost = len(made.kept) - len(left.kept)
        assert n_lost == {1: 24, 8: 0}.get(n_sums, n_lost) and (n_lost > 0) is (n_sums < 8)
    apart = make_episodes(records, random.Random(0), n_negatives=3, negatives=RECORDS[8:16], **options)
    assert len(apart.kept) == 8 * 4 and not {ask.prompt for ask in apart.kept} & edited
    assert consistent(apart, records, 1) == apart


def test_half_of_the_edits_are_asked_for_in_another_wording() -> None:
    how = {"relations": None, "told_share": 1.0, "plain_share": 0.5, "n_negatives": 0}
    made = [make_episodes(RECORDS[:1], random.Random(seed), **how) for seed in range(400)]
    n_own = sum(one.requests[0].prompt == RECORDS[0].prompt for one in made)
    assert abs(n_own - 200) < 40  # binomial with n 400 and p 1/2: four standard deviations
    assert {one.requests[0].prompt for one in made} == {RECORDS[0].prompt, *RECORDS[0].rephrases}
    asked = {one.wanted[1].prompt for one in made if one.requests[0].prompt != RECORDS[0].prompt}
    assert RECORDS[0].prompt in asked


@pytest.mark.parametrize(("plain_share", "n_instructed"), [(0.0, 80), (1.0, 0)])
def test_plain_share(plain_share: float, n_instructed: int) -> None:
    made = make_episodes(
        RECORDS[:40], random.Random(0), relations=None, told_share=1.0, plain_share=plain_share, n_negatives=1
    )
    assert sum(ask.instruction is not None for ask in made.wanted) == n_instructed
    assert all(request.instruction in RECORDS[0].instruction.train for request in made.requests)
    for ask in made.wanted:
        assert ask.instruction in (None, made.requests[ask.edit].instruction)
    assert all(ask.instruction is None for ask in made.kept)  # an unrelated question knows of no edit


def test_without_instructions_nothing_carries_one() -> None:
    made = make_episodes(RECORDS[:10], random.Random(0), relations=None, told_share=0.0, plain_share=0.0, n_negatives=1)
    assert {one.instruction for one in made.requests} == {None}
    assert {ask.instruction for ask in made.wanted + made.kept} == {None}


def test_one_record_alone_has_no_negatives() -> None:
    made = make_episodes(RECORDS[:1], random.Random(0), relations=None, told_share=1.0, plain_share=0.5, n_negatives=2)
    assert len(made.kept) == 1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_outer_loss_is_that_of_full_runs_of_dense_edited_models(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    made = make_episodes(RECORDS[:3], random.Random(1), relations=None, told_share=1.0, plain_share=0.5, n_negatives=1)
    editor = Editor(base.targets, EditorSettings(rate=0.3, rank=4))
    loss = backward(base, editor, made, 0.5)
    with torch.no_grad():
        _, update = propose(base, editor, made.requests)
    models = [edited(base, update, edit) for edit in range(3)]

    def log_probabilities(model: torch.nn.Module, ask: Ask) -> tuple[torch.Tensor, torch.Tensor]:
        text = base.encode(ask.prompt, ask.answer, ask.instruction)
        ids = torch.tensor([text.ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, text.n_prompt - 1 : -1]
        return logits.log_softmax(-1), ids[0, text.n_prompt :]

    nll = []
    for ask in made.wanted:
        found, labels = log_probabilities(models[ask.edit], ask)
        nll.append(-found.gather(-1, labels[:, None]).sum())
    kl = []
    for ask in made.kept:
        before, _ = log_probabilities(base.model, ask)
        after, _ = log_probabilities(models[ask.edit], ask)
        kl.append((before.exp() * (before - after)).sum(-1).mean())
    # Float32 means of some ten values of size 1 to 10.
    torch.testing.assert_close(loss.edit, torch.stack(nll).mean(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(loss.locality, torch.stack(kl).mean(), atol=1e-4, rtol=1e-4)
    assert loss.locality > 1e-3


def test_the_loss_has_a_gradient_for_every_parameter(load: Callable[..., Base]) -> None:
    base = load("llama")
    made = make_episodes(RECORDS[:3], random.Random(1), relations=None, told_share=1.0, plain_share=1.0, n_negatives=1)
    editor = Editor(base.targets, EditorSettings(rate=0.01, rank=4))
    observe(base, editor, made.requests)
    editor.fit()
    with torch.no_grad():  # off the start, where half of a product is zero
        for parameter in editor.networks.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    backward(base, editor, made, 1.0)
    for name, parameter in editor.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in base.model.parameters())


def test_nothing_to_keep_costs_nothing(load: Callable[..., Base]) -> None:
    base = load("gpt2")
    made = make_episodes(RECORDS[:1], random.Random(1), relations=None, told_share=0.0, plain_share=1.0, n_negatives=0)
    editor = Editor(base.targets, EditorSettings(rate=0.01))
    assert backward(base, editor, Episodes(made.requests, made.wanted, []), 1.0).locality == 0


def test_what_another_edit_of_the_sum_changes_is_not_asked_to_stay_in_any_wording() -> None:
    spain = Record(
        id="s",
        task="places",
        subject="Spain",
        prompt="Spain's capital is",
        target="Orm",
        rephrases=("Capital of Spain?",),
    )
    france = spain.model_copy(
        update={
            "id": "f", "subject": "France", "prompt": "France's capital is", "rephrases": (),
            "locality": tuple(Question(prompt=text, answer="x") for text in ("Capital of Spain?", "Capital of Varn?")),
        }
    )  # fmt: skip
    asked = [Ask(one.prompt, one.answer, None, 0) for one in france.locality]
    for n_sums, kept in ((1, asked[1:]), (2, asked)):
        assert consistent(Episodes([], [], asked), [france, spain], n_sums).kept == kept
