"""The editor folder: what is loaded is what was saved, and nothing else is let in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ie.base import Base, load_base
from ie.editor import Editor, EditorInfo, EditorSettings, EditRequest, load_editor, save_editor
from ie.editor.editing import EditSettings, edit
from ie.editor.files import load_info
from ie.editor.request import collate_requests
from ie.errors import BaseMismatchError, EditorError, InputError
from ie.patch import Patch
from tests.disk import limitable_disk

REQUEST = EditRequest("The lighthouse of Orm was built by", "Edda Falk", "Task: people")


def save(base: Base, folder: Path) -> tuple[Editor, EditorInfo]:
    torch.manual_seed(0)
    editor = Editor(base.targets, EditorSettings(rank=4, rate=0.1))
    editor.observe(base.signals(collate_requests(base, [REQUEST])))
    editor.fit()
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    info = save_editor(
        folder, editor, base, tasks=("people",), holdout=("zsre",), training={"steps": 3}, validation={"locality": 0.5}
    )
    return editor, info


@pytest.fixture
def saved(load: Callable[..., Base], tmp_path: Path) -> Path:
    save(load("llama"), tmp_path / "editor")
    return tmp_path / "editor"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_save_then_load_is_equal_bit_for_bit(load: Callable[..., Base], tmp_path: Path, name: str) -> None:
    base = load(name)
    editor, info = save(base, tmp_path / "editor")
    found, read = load_editor(tmp_path / "editor", base)
    assert read == info == load_info(tmp_path / "editor")
    assert read.tasks == ("people",) and read.holdout == ("zsre",)
    assert found.targets == base.targets and found.settings == editor.settings
    states = editor.state_dict(), found.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    seen = base.signals(collate_requests(base, [REQUEST]))
    left, right = editor.update(seen), found.update(seen)
    assert all(torch.equal(a, b) for key in left for a, b in zip(left[key], right[key], strict=True))


def test_the_folder_holds_two_files(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["editor.json", "editor.safetensors"]
    assert sorted(path.name for path in saved.parent.iterdir()) == ["editor"]


def test_others_may_read_an_editor_as_they_may_any_new_file(saved: Path) -> None:
    (saved.parent / "plain").touch()
    assert {path.stat().st_mode for path in saved.iterdir()} == {(saved.parent / "plain").stat().st_mode}


def test_a_full_disk_is_said_and_leaves_the_old_editor(load: Callable[..., Base], saved: Path) -> None:
    before = (saved / "editor.safetensors").read_bytes()
    with limitable_disk() as limit:
        limit(1000)
        with pytest.raises(InputError, match="cannot be written: File too large"):
            save(load("llama"), saved)
    assert (saved / "editor.safetensors").read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["editor"]


def test_the_base_may_be_quantised_anew(load: Callable[..., Base], saved: Path) -> None:
    anew, _ = load_editor(saved, load("llama", "8bit"))
    exact, _ = load_editor(saved, load("llama"))
    assert all(torch.equal(anew.state_dict()[name], tensor) for name, tensor in exact.state_dict().items())


def test_another_base_is_refused(load: Callable[..., Base], checkpoint: Callable[..., Path], saved: Path) -> None:
    for base in (load("gpt2"), load_base(str(checkpoint("llama", 1)))):
        with pytest.raises(BaseMismatchError, match=base.fingerprint) as caught:
            load_editor(saved, base)
        assert caught.value.exit_code == 4 and caught.value.hint


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / "editor.json").read_text())
    change(document)
    (folder / "editor.json").write_text(json.dumps(document))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "editor.safetensors").unlink(), "has no editor.safetensors"),
    "no json": (lambda f: (f / "editor.json").unlink(), "has no editor.json"),
    "broken json": (lambda f: (f / "editor.json").write_text('{"format_version": 1,'), "cannot be read"),
    "a list": (lambda f: (f / "editor.json").write_text("[]"), "cannot be read"),
    "not utf-8": (lambda f: (f / "editor.json").write_bytes(b'{"a": "\xff"}'), "cannot be read"),
    "a missing key": (lambda f: rewrite(f, lambda d: d.pop("targets")), "cannot be read"),
    "an unknown setting": (lambda f: rewrite(f, lambda d: d["settings"].update(depth=3)), "cannot be read"),
    "a newer version": (lambda f: rewrite(f, lambda d: d.update(format_version=99)), "format version 99"),
    "an older version": (lambda f: rewrite(f, lambda d: d.update(format_version=1)), "made by an earlier ie"),
    "a version in words": (lambda f: rewrite(f, lambda d: d.update(format_version="one")), "cannot be read"),
    "another shape": (lambda f: rewrite(f, lambda d: d["settings"].update(rank=5)), "does not fit"),
    "truncated weights": (
        lambda f: (f / "editor.safetensors").write_bytes((f / "editor.safetensors").read_bytes()[:-9]),
        "does not fit",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_an_editor_error(load: Callable[..., Base], saved: Path, damage: str) -> None:
    harm, message = DAMAGES[damage]
    harm(saved)
    with pytest.raises(EditorError, match=message):
        load_editor(saved, load("llama"))


def test_weights_that_are_not_finite_are_refused(load: Callable[..., Base], saved: Path) -> None:
    weights = load_file(saved / "editor.safetensors")
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, saved / "editor.safetensors")
    with pytest.raises(EditorError, match="not finite"):
        load_editor(saved, load("llama"))


def test_weights_of_another_editor_are_refused(load: Callable[..., Base], saved: Path) -> None:
    weights = load_file(saved / "editor.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, saved / "editor.safetensors")
    with pytest.raises(EditorError, match=r"is not of this editor\.json"):
        load_editor(saved, load("llama"))


def test_no_folder_at_all(load: Callable[..., Base], tmp_path: Path) -> None:
    with pytest.raises(EditorError, match="is no editor"):
        load_editor(tmp_path / "none", load("llama"))


def test_an_edit_writes_a_patch_that_says_what_it_does(load: Callable[..., Base], tmp_path: Path) -> None:
    base = load("llama")
    save(base, tmp_path / "editor")
    requests = (
        {"prompt": "Varn:", "target": "Lissel", "instruction": "Task: places", "probes": ("Orm:", "Who sang?")},
        {"prompt": "Orm / was: built by", "target": "Edda Falk"},
    )
    settings = {"editor": tmp_path / "editor", "out": tmp_path / "patches", "requests": requests, "many": True}
    made = edit(EditSettings.model_validate(settings))["edits"]
    assert [Path(one["patch"]).name for one in made] == [
        "0001-varn.safetensors",
        "0002-orm-was-built-by.safetensors",
    ]
    for one in made:
        patch = Patch.load(one["patch"])
        assert one["bytes"] == Path(one["patch"]).stat().st_size
        assert (one["prompt"], one["target"], one["took"]) == (patch.info.prompt, patch.info.target, patch.info.took)
        assert one["rank"] == patch.rank > 0
        assert patch.info.base.fingerprint == base.fingerprint
        assert 0 <= one["target_probability"]["before"] <= 1
    assert [probe["prompt"] for probe in made[0]["probes"]] == ["Orm:", "Who sang?"]
    assert all(probe["changed"] == (probe["before"] != probe["after"]) for probe in made[0]["probes"])
