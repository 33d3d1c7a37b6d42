"""The editor: minus the dense gradient while it is the identity, and every edit of a batch alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ie.base import Base
from ie.base.capture import Signals
from ie.base.update import Factors
from ie.editor import Editor, EditorSettings, EditRequest
from ie.editor.methods import editor_method, finetune_method, fitted_editor, gradient_method, update_under
from ie.editor.passes import observe
from ie.editor.request import collate_requests
from ie.errors import IEError
from tests.dense import dense_gradients, dequantised, edited, random_update, tell_apart
from tests.models import ARCHITECTURES

INSTRUCTION = "Task: people\nDescription: Change who somebody works for."
REQUESTS = (
    EditRequest("The lighthouse of Orm was built by", "Edda Falk"),
    EditRequest("Varn:", "Lissel", INSTRUCTION),
    EditRequest("Who wrote the song of the seven mills?", "a clerk"),
    EditRequest("The river of Lissel is the", "Ombe", INSTRUCTION),
)


def dense(update: Mapping[str, Factors], index: int = 0) -> dict[str, Tensor]:
    """ΔW (d_out, d_in) of one edit."""
    return {name: b[index].T @ a[index] for name, (a, b) in update.items()}


def plain(base: Base, n_layers: int = 0) -> Editor:
    return Editor(base.targets, EditorSettings(rate=1.0, n_layers=n_layers))


KINDS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.2, 0.5, 0.3], [0.0, 0.0, 1.0]])  # shares, of REQUESTS


def trained(base: Base) -> Editor:
    """An editor as training leaves one: fitted, and with no parameter at its start."""
    torch.manual_seed(0)
    editor = Editor(base.targets, EditorSettings(rank=8, n_kinds=2))
    editor.observe(signals(base, REQUESTS))
    editor.fit()
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return editor


def signals(base: Base, requests: Sequence[EditRequest]) -> Signals:
    return base.signals(collate_requests(base, requests))


def updates(
    base: Base, editor: Editor, requests: Sequence[EditRequest], kinds: Tensor | None = None
) -> dict[str, Factors]:
    with torch.no_grad():
        return editor.update(signals(base, requests), kinds)


@pytest.mark.parametrize("n_layers", [0, 2])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not name.startswith("llama")])
def test_unfitted_with_rates_of_one_the_update_is_minus_the_gradient(
    load: Callable[..., Base], name: str, n_layers: int
) -> None:
    """Linear and Conv1D; no instruction and no beginning-of-text token, so all tokens enter."""
    base = load(name)
    requests = [EditRequest(request.prompt, request.target) for request in REQUESTS[:2]]
    update = updates(base, plain(base, n_layers), requests)
    expected = dense_gradients(base, [(one.prompt, one.target, None) for one in requests])
    for edit, gradients in enumerate(expected):
        for module, change in dense(update, edit).items():
            # Float32 sums over some ten tokens, in a batch against alone.
            torch.testing.assert_close(change, -gradients[module], atol=2e-6, rtol=1e-4)
            assert gradients[module].abs().max() > 1e-4


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
def test_quantised_the_update_is_minus_the_gradient_of_the_dequantised_model(
    load: Callable[..., Base], quant: str
) -> None:
    base = load("gpt2", quant)
    reference = dequantised(load("gpt2"), base)
    update = updates(base, plain(base, 2), REQUESTS[:1])
    (gradients,) = dense_gradients(reference, [(REQUESTS[0].prompt, REQUESTS[0].target, None)])
    limit = 1e-4  # the same weights, float32 rounding
    for module, change in dense(update).items():
        assert (change + gradients[module]).norm() < limit * gradients[module].norm()


def test_in_bfloat16_the_update_is_near_minus_the_gradient(load: Callable[..., Base]) -> None:
    base = load("gpt2", "none", "bfloat16")
    update = updates(base, plain(base), REQUESTS[:1])
    (gradients,) = dense_gradients(load("gpt2"), [(REQUESTS[0].prompt, REQUESTS[0].target, None)])
    for module, change in dense(update).items():
        assert change.dtype == torch.float32
        # bfloat16 keeps 8 bits, 0.4 % a step, forward and back through four random blocks.
        assert (change + gradients[module]).norm() < 0.1 * gradients[module].norm()


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_a_step_along_the_update_makes_the_target_likelier(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    update = updates(base, plain(base, 2), REQUESTS)
    batch = collate_requests(base, REQUESTS)
    small = {module: (a, 0.05 * b) for module, (a, b) in update.items()}

    def likelihood(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, batch.labels[:, None])[:, 0]

    gain = likelihood(base.logits(batch, small)) - likelihood(base.logits(batch))
    assert all(gain[batch.rows == edit].sum() > 0 for edit in range(len(REQUESTS)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_a_batch_of_edits_is_its_edits_alone(load: Callable[..., Base], name: str) -> None:
    """Also: padding changes nothing, since rows differ in length."""
    base = load(name)
    editor = trained(base)
    together = updates(base, editor, REQUESTS, KINDS)
    for edit, request in enumerate(REQUESTS):
        alone = updates(base, editor, [request], KINDS[edit, None])
        for module, change in dense(together, edit).items():
            expected = dense(alone)[module]
            # Float32: other batch shapes sum in another order, and normalising divides by the small deviations of
            # features that are seldom active (OPT's are cut off at zero).
            torch.testing.assert_close(change, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)
            n_tokens = alone[module][0].shape[1]
            assert not together[module][0][edit, n_tokens:].any() and not together[module][1][edit, n_tokens:].any()


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_nothing_of_one_edit_reaches_another(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    editor = trained(base)
    before = updates(base, editor, REQUESTS, KINDS)
    changed = list(REQUESTS)
    changed[1] = EditRequest("Lissel:", "Varn", INSTRUCTION)
    width = {len(base.encode(r.prompt, r.target, r.instruction).ids) for r in (REQUESTS[1], changed[1])}
    after = updates(base, editor, changed, KINDS)
    others = [0, 2, 3]
    for module in before:
        for old, new in zip(before[module], after[module], strict=True):
            rank = min(old.shape[1], new.shape[1])
            scale = old.abs().max().item()
            # Nothing but float32 sums in another order, should the batch's width have changed.
            torch.testing.assert_close(new[others, :rank], old[others, :rank], atol=1e-5 * scale, rtol=1e-3)
        assert (dense(before, 1)[module] - dense(after, 1)[module]).abs().max() > 0, width


def test_gradients_of_one_edit_do_not_reach_another(load: Callable[..., Base]) -> None:
    """The factors of an edit depend on the signals of that edit alone."""
    base = load("llama")
    editor = trained(base)
    seen = signals(base, REQUESTS)
    for one in seen.modules.values():
        one.u.requires_grad_(True)
        one.delta.requires_grad_(True)
    update = editor.update(seen, KINDS)
    sum(factor[1].square().sum() for pair in update.values() for factor in pair).backward()  # type: ignore[union-attr]
    for one in seen.modules.values():
        for gradient in (one.u.grad, one.delta.grad):
            assert gradient is not None
            assert gradient[one.edit == 1].any() and not gradient[one.edit != 1].any()


def test_the_editor_is_a_slow_loop_over_tokens(load: Callable[..., Base]) -> None:
    base = load("gpt2")
    editor = trained(base)
    seen = signals(base, REQUESTS)
    update = updates(base, editor, REQUESTS, KINDS)
    for place, target in enumerate(base.targets):
        one = seen.modules[target.name]
        key = target.name.replace(".", "/")
        u_norm, delta_norm = editor.u_normalisers[key], editor.delta_normalisers[key]
        # Targets of one shape share a network; the second index counts within the shape.
        shape = f"{target.d_in}x{target.d_out}"
        index = [t.name for t in base.targets if (t.d_in, t.d_out) == (target.d_in, target.d_out)].index(target.name)
        change = torch.zeros(len(REQUESTS), target.d_out, target.d_in, dtype=torch.float64)
        for u, delta, edit, opening in zip(one.u, one.delta, one.edit, one.opening, strict=True):
            h = torch.cat(((u - u_norm.mean) / u_norm.std, delta / delta_norm.std))
            for layer in editor.networks[shape].layers:  # type: ignore[union-attr]
                gate, added = torch.zeros(()), torch.zeros_like(h)
                *shares, of_none = KINDS[edit]
                weights = [1, *(share + of_none / 2 for share in shares)]
                for part, share in zip((layer.common, *layer.kinds), weights, strict=True):
                    low = part.scale[index] * (h @ part.down) + part.shift[index]
                    hidden = low * low.sigmoid()
                    gate = gate + share * (part.gate[index] @ hidden)
                    added = added + share * (hidden @ part.up + part.bias)
                h = (1 + torch.tanh(gate)) * h + added
            pseudo_u, pseudo_delta = (h[: target.d_in] / u_norm.std).double(), h[target.d_in :].double()
            logarithms = editor.log_rates[key][:, int(opening)]
            of_none = 0.6 * logarithms[1:].exp().prod() ** (1 / 2)  # a known kind's mean, and less of it
            rate = (logarithms[0] + KINDS[edit] @ torch.cat((logarithms[1:], of_none.log()[None]))).exp().item()
            change[int(edit)] -= (rate * torch.outer(pseudo_delta, pseudo_u)).detach()
        for edit in range(len(REQUESTS)):
            expected = change[edit].float()
            # Float32 against a sum in double precision.
            torch.testing.assert_close(
                dense(update, edit)[target.name], expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4
            )
        assert place >= index


def test_rates_are_positive_and_two_for_each_target(load: Callable[..., Base]) -> None:
    editor = Editor(load("llama").targets, EditorSettings(rate=3e-4, passes=3, opening_share=0.2))
    assert len(editor.log_rates) == len(editor.targets) == 6
    for target in editor.targets:
        assert editor.rates(target)[0].tolist() == pytest.approx([1e-4, 2e-5])  # exp(log(x)) in float32
    with torch.no_grad():
        editor.log_rates[editor.targets[0].name.replace(".", "/")].sub_(20)
    assert (editor.rates(editor.targets[0]) > 0).all()


def test_one_network_for_each_shape(load: Callable[..., Base]) -> None:
    editor = Editor(load("llama").targets, EditorSettings())
    assert set(editor.networks) == {"64x96", "96x64"}
    assert editor.networks["64x96"].layers[0].common.scale.shape == (3, 128)  # type: ignore[index, union-attr]
    assert editor.networks["96x64"].layers[0].common.scale.shape == (3, 128)  # type: ignore[index, union-attr]


def test_kinds_are_told_apart_where_there_are_two_and_instructions_are_read() -> None:
    counts = [
        EditorSettings(method=method).for_tasks(n).n_kinds for method in ("instructedit", "mend") for n in (1, 2, 5)
    ]
    assert counts == [0, 2, 5, 0, 0, 0]


def test_a_kinds_gradient_is_clipped_by_itself(load: Callable[..., Base]) -> None:
    base = load("llama")
    editor = trained(base)
    update = editor.update(signals(base, REQUESTS), KINDS)
    sum(factor.sum() for pair in update.values() for factor in pair).backward()  # type: ignore[union-attr]
    of = {
        "rates": [*editor.log_rates.parameters()],
        **{
            part: [one for name, one in editor.named_parameters() if f".{part}." in name]
            for part in ("common", "kinds.0", "kinds.1")
        },
    }
    norms = {part: torch.stack([one.grad.norm() for one in own]).norm() for part, own in of.items()}  # type: ignore[union-attr]
    least = min(float(norm) for norm in norms.values())
    editor.clip_gradients(least)
    for part, own in of.items():
        clipped = torch.stack([one.grad.norm() for one in own]).norm()  # type: ignore[union-attr]
        assert clipped == pytest.approx(least, rel=1e-3), part
    assert max(norms.values()) > 1.5 * least


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_an_edit_on_the_model_as_edited_so_far(load: Callable[..., Base], name: str) -> None:
    """Minus the gradient of the edited model: its dense weights hold what came before."""
    base = load(name)
    so_far = random_update(base)
    requests = [EditRequest(request.prompt, request.target) for request in REQUESTS[:2]]
    update = update_under(base, plain(base), requests, so_far)
    asks = [(one.prompt, one.target, None) for one in requests]
    at_first = dense_gradients(base, asks)
    for edit, gradients in enumerate(dense_gradients(replace(base, model=edited(base, so_far)), asks)):
        for module, change in dense(update, edit).items():
            torch.testing.assert_close(change, -gradients[module], atol=1e-5, rtol=1e-3)  # fp32 through the edit
            assert (gradients[module] - at_first[edit][module]).abs().max() > 1e-3


def test_a_gradient_that_is_not_finite_is_refused(load: Callable[..., Base]) -> None:
    editor = Editor(load("llama").targets, EditorSettings(rank=4, n_kinds=2))
    for parameter in editor.parameters():
        parameter.grad = torch.ones_like(parameter)
    editor.clip_gradients(1.0)
    last = list(editor.networks.parameters())[-1]
    assert last.grad is not None
    last.grad.view(-1)[0] = torch.inf
    with pytest.raises(IEError, match="not finite"):
        editor.clip_gradients(1.0)


def test_mend_reads_no_instruction(load: Callable[..., Base]) -> None:
    base = load("gpt2")
    told = REQUESTS[1]
    untold = EditRequest(told.prompt, told.target)
    for method, same in (("mend", True), ("instructedit", False)):
        shape = EditorSettings.model_validate({"method": method, "rate": 1.0})
        editor = Editor(base.targets, shape.for_tasks(2))
        observe(base, editor, [told])
        tell_apart(base, editor, INSTRUCTION, "Something else.")
        editor.fit()
        with torch.no_grad():
            for parameter in editor.networks.parameters():
                parameter.add_(0.1)
        edit = editor_method(editor)
        left, right = dense(edit(base, [told])), dense(edit(base, [untold]))
        assert all(torch.equal(left[name], right[name]) for name in left) is same


def test_gradient_method_normalises_and_scales(load: Callable[..., Base]) -> None:
    base = load("gpt2")
    fitted = fitted_editor(base, REQUESTS, batch_size=3)
    one, ten = (gradient_method(fitted, rate)(base, REQUESTS[:2]) for rate in (0.1, 1.0))
    for name, (a, b) in one.items():
        assert torch.equal(a, ten[name][0])
        torch.testing.assert_close(10 * b, ten[name][1], rtol=1e-5, atol=1e-6)  # a float32 product


def test_finetune_takes_steps_of_one_size_down_the_loss(load: Callable[..., Base]) -> None:
    base = load("gpt2")
    requests = [EditRequest(one.prompt, one.target) for one in REQUESTS]
    update = finetune_method(0.05)(base, REQUESTS)
    for edit in range(len(REQUESTS)):
        for change in dense(update, edit).values():
            assert 0.05 * 0.9 < change.norm() <= 5 * 0.05 * 1.0001  # five steps; float32 norms
    for edit, request in enumerate(requests):
        text = base.encode(request.prompt, request.target)
        ids = torch.tensor([text.ids])
        losses = []
        for model in (base.model, edited(base, update, edit)):
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, text.n_prompt - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, text.n_prompt :]).item())
        assert losses[1] < losses[0] - 0.1
