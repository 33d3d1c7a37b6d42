"""Stacks: a sum in any order, from which each edit comes out exactly; and who disturbs whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ie.base import Base
from ie.errors import InputError
from ie.patch import Patch, applied
from ie.patch.apply import apply_patch
from ie.patch.info import Parent, Probed
from ie.patch.stacking import chunks, split, stacked, without
from tests.patch.edits import TAKES_ON, TARGET, taking
from tests.patch.test_patch import logits_of, make


@pytest.fixture
def files(load: Callable[..., Base], tmp_path: Path) -> list[Path]:
    """Three patches of the tiny Llama: fp16, fp16, and fp32 at half strength."""
    base = load("llama")
    patches = [make(base, seed=seed, rank=seed, size=0.02) for seed in (1, 2, 3)]
    patches = [patches[0].rounded("float16"), patches[1].rounded("float16"), patches[2]]
    patches[2] = replace(patches[2], info=patches[2].info.model_copy(update={"scale": 0.3}))
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for patch, path in zip(patches, paths, strict=True):
        patch.save(path)
    return paths


def logits(base: Base, *patches: Patch) -> Tensor:
    with applied(base, *patches):
        return logits_of(base)


def stack_file(paths: list[Path], out: Path, base: Base, **options: object) -> Patch:
    apply_patch(paths, model=base.id, out=out, dtype="float32", **options)  # type: ignore[arg-type]
    return Patch.load(out)


def test_a_stack_file_is_the_patches_together(load: Callable[..., Base], files: list[Path], tmp_path: Path) -> None:
    base = load("llama")
    both = stack_file(files, tmp_path / "all", base)
    expected = logits(base, *(Patch.load(path) for path in files))
    assert torch.equal(logits(base, both), expected)
    assert (logits_of(base) - expected).abs().max() > 0.05
    assert [parent.name for parent in both.info.parents] == ["a.safetensors", "b.safetensors", "c.safetensors"]
    assert [parent.info.scale for parent in both.info.parents] == [1.0, 1.0, 0.3]
    assert both.info.parents[0].info == Patch.load(files[0]).info  # all of its provenance
    assert both.dtype == "float32"  # 0.3 · B has no fp16
    assert stack_file(files[:2], tmp_path / "two", base).dtype == "float16"


def test_order_makes_no_difference(load: Callable[..., Base], files: list[Path], tmp_path: Path) -> None:
    base = load("llama")
    one = logits(base, stack_file(files, tmp_path / "one", base))
    other = logits(base, stack_file(files[::-1], tmp_path / "other", base))
    torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-6)  # the order of a float32 sum


@pytest.mark.parametrize("name", ["b.safetensors", "2"])
def test_taking_one_out_leaves_the_others_bit_for_bit(
    load: Callable[..., Base], files: list[Path], tmp_path: Path, name: str
) -> None:
    base = load("llama")
    stack_file(files, tmp_path / "all", base)
    rest = stack_file([tmp_path / "all"], tmp_path / "rest", base, leave_out=[name])
    assert torch.equal(logits(base, rest), logits(base, Patch.load(files[0]), Patch.load(files[2])))
    assert [parent.name for parent in rest.info.parents] == ["a.safetensors", "c.safetensors"]


def test_the_last_one_left_is_its_own_file_again(load: Callable[..., Base], files: list[Path], tmp_path: Path) -> None:
    base = load("llama")
    stack_file(files, tmp_path / "all", base)
    stack_file([tmp_path / "all"], tmp_path / "a", base, leave_out=["3", "b.safetensors"])
    assert Patch.load(tmp_path / "a").dtype == "float16"
    assert (tmp_path / "a").read_bytes() == files[0].read_bytes()


def test_a_stack_stacks_again_and_scales(load: Callable[..., Base], files: list[Path], tmp_path: Path) -> None:
    base = load("llama")
    stack_file(files[:2], tmp_path / "two", base)
    again = stack_file([tmp_path / "two", files[2]], tmp_path / "three", base)
    assert torch.equal(logits(base, again), logits(base, *(Patch.load(path) for path in files)))
    assert len(again.info.parents) == 3 and not any(parent.info.parents for parent in again.info.parents)
    half = stack_file([tmp_path / "two"], tmp_path / "half", base, scale=0.5)
    with applied(base, Patch.load(files[0]), Patch.load(files[1]), scale=0.5):
        expected = logits_of(base)
    assert torch.equal(logits(base, half), expected)
    assert [parent.info.scale for parent in half.info.parents] == [0.5, 0.5]


def test_at_another_strength_a_patch_says_what_was_seen_there(load: Callable[..., Base], tmp_path: Path) -> None:
    probes = (Probed(prompt="Varn:", before="x", after="y"),)
    patch = taking(load)
    patch = replace(patch, info=patch.info.model_copy(update={"took": True, "probes": probes}))
    patch.save(tmp_path / "p")
    patch = Patch.load(tmp_path / "p")
    found = apply_patch([tmp_path / "p"], scale=1e-3, out=tmp_path / "weak", peft=tmp_path / "adapter", dtype="float32")
    weak, entry = Patch.load(tmp_path / "weak").info, found["patches"][0]
    assert (weak.took, weak.after, weak.probes) == (False, entry["after"], ()) and entry["took"] is False
    assert "| no |" in (tmp_path / "adapter" / "README.md").read_text()
    apply_patch([tmp_path / "p"], scale=1.0, out=tmp_path / "same", dtype="float32")
    assert Patch.load(tmp_path / "same").info == patch.info
    apply_patch([tmp_path / "p", tmp_path / "p"], scale=1e-3, out=tmp_path / "two", dtype="float32")
    assert [(one.info.took, one.info.after) for one in Patch.load(tmp_path / "two").info.parents] == [(False, None)] * 2


def joint_of(patch: Patch, *targets: str) -> Patch:
    """A joint patch that says of some edits of one prompt that they took."""
    asked = [patch.info.model_copy(update={"target": target, "took": True}) for target in targets]
    parents = tuple(Parent(name=one.target or "", dtype="float32", ranks={}, took=True, info=one) for one in asked)
    none = dict.fromkeys(("prompt", "target", "before", "after"))
    return replace(patch, info=patch.info.model_copy(update={**none, "took": True, "parents": parents}))


def test_a_joint_patch_is_asked_all_its_edits(load: Callable[..., Base], tmp_path: Path) -> None:
    joint_of(taking(load), TARGET, "Falk").save(tmp_path / "j")
    taking(load, 1e-3).save(tmp_path / "p")
    found = apply_patch([tmp_path / "j"], prompts=["Varn:"], dtype="float32", merge=tmp_path / "merged")
    entry = found["patches"][0]
    assert [(one["target"], one["took"]) for one in entry["edits"]] == [(TARGET, True), ("Falk", False)]
    assert (entry["took"], entry["after"], found["took"]) == (False, None, False)
    assert [one["prompt"] for one in found["previews"]] == ["Varn:"]
    assert found["merged"]["answers"] == [one["after"] for one in entry["edits"]]
    both = apply_patch([tmp_path / "p", tmp_path / "j"], dtype="float32")
    assert [one["took_alone"] for one in both["patches"]] == [False, False] and not both["disturbed"]
    apply_patch([tmp_path / "j"], scale=1e-3, out=tmp_path / "weak", dtype="float32")
    weak = Patch.load(tmp_path / "weak").info
    assert weak.took is False and [one.took for one in weak.parents] == [False, False]
    assert all(one.info.after and one.info.took is False for one in weak.parents)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["x"], "names no edit"),
        (["4"], "names no edit"),
        (["0"], "names no edit"),
        (["1", "2", "3"], "no edit is left"),
    ],
)
def test_what_cannot_be_taken_out(load: Callable[..., Base], names: list[str], said: str) -> None:
    patch = make(load("llama"))
    parts = [part for name in "abc" for part in split(patch, Path(name))]
    with pytest.raises(InputError, match=said):
        without(parts, names)
    with pytest.raises(InputError, match="names several"):
        without([parts[0], parts[0]], ["a"])


def test_a_disturbed_edit_is_named_with_its_disturber(load: Callable[..., Base], tmp_path: Path) -> None:
    """A strong patch of another edit's modules, and a weak one that harms nobody."""
    base = load(TAKES_ON)
    patches = {
        "victim": taking(load),
        "weak": make(base, seed=5, size=1e-4),
        "strong": make(base, seed=4, size=1.0),
        "silent": make(base, seed=7, size=1e-4),
    }
    unasked = patches["silent"].info.model_copy(update={"prompt": None, "target": None})
    patches["silent"] = replace(patches["silent"], info=unasked)
    for name, patch in patches.items():
        patch.save(tmp_path / name)
    found = apply_patch([tmp_path / name for name in patches], dtype="float32")
    assert [one["took_alone"] for one in found["patches"]] == [True, False, False, None]
    assert [one["took"] for one in found["patches"]] == [False, False, False, None]
    assert [(one["patch"], one["by"], one["most_by"]) for one in found["disturbed"]] == [
        ("victim", ["strong"], "strong")
    ]
    calm = apply_patch([tmp_path / name for name in ("victim", "weak", "silent")], dtype="float32")
    assert calm["patches"][0]["took"] and not calm["disturbed"]
    assert calm["took"] is False  # the weak one has no target that it could reach


def test_updates_are_held_side_by_side_as_far_as_their_padding_allows() -> None:
    ranks = [9, 3000, 8, *[10] * 40, 2000]
    found = list(chunks(ranks))
    assert sorted(i for chunk in found for i in chunk) == list(range(len(ranks)))
    assert all(len(chunk) <= 32 and len(chunk) * max(ranks[i] for i in chunk) <= 4096 for chunk in found)
    assert [43] in found and [1] in found  # joint patches, each alone


def test_editors_are_told_apart(load: Callable[..., Base]) -> None:
    base = load("llama")
    one = split(make(base), Path("a"))[0]
    other = replace(one, info=one.info.model_copy(update={"editor": "another"}))
    assert stacked([one, one], base, [True, True]).info.editor == one.info.editor
    assert stacked([one, other], base, [True, False]).info.editor is None
    assert stacked([one, other], base, [True, False]).info.took is False
