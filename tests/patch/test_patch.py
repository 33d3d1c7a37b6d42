"""The patch file: equal after a round trip, refused when hostile; applied, a dense change that leaves no trace."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ie.base import Base
from ie.base.asking import Ask, answers
from ie.errors import BaseMismatchError, InputError, PatchError
from ie.patch import Patch, PatchInfo, applied
from ie.patch.info import Kept, PatchBase
from ie.patch.live import check_base, combined
from tests.dense import PROMPTS, edited, logits_of, random_update, state_hash
from tests.disk import limitable_disk
from tests.models import ARCHITECTURES


def make(base: Base, seed: int = 0, rank: int = 3, scale: float = 1.0, size: float = 0.1) -> Patch:
    info = PatchInfo(
        base=PatchBase(id=base.id, fingerprint=base.fingerprint),
        editor="0123456789abcdef",
        instruction="Task: people\nDescription: “Wer” arbeitet wo? 東京",
        prompt="The lighthouse of Orm was built by",
        target="Edda Falk",
        before="Ann Ot",
        after="Edda Falk",
        took=True,
        scale=scale,
        created="2030-01-02T03:04:05+00:00",
        versions={"ie": "0"},
    )
    update = random_update(base, seed=seed, rank=rank, size=size)
    return Patch(info, {name: (a[0], b[0]) for name, (a, b) in update.items()})


class TestFile:
    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_save_then_load_is_equal(self, load: Callable[..., Base], tmp_path: Path, name: str) -> None:
        patch = make(load(name), scale=0.5)
        path = tmp_path / "some" / "patch.safetensors"
        assert patch.save(path) == path.stat().st_size
        found = Patch.load(path)
        norms = {key: (b.T @ a).norm().item() for key, (a, b) in patch.factors.items()}
        assert found.info.norms == pytest.approx(norms, rel=1e-5)  # Gram matrices in float64 against float32 products
        assert found.info.model_copy(update={"norms": None}) == patch.info
        assert found.factors.keys() == patch.factors.keys()
        for key, pair in patch.factors.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, found.factors[key], strict=True))
        assert found.rank == 3
        assert [path.name for path in path.parent.iterdir()] == ["patch.safetensors"]

    def test_what_the_file_holds(self, load: Callable[..., Base], tmp_path: Path) -> None:
        make(load("gpt2")).save(tmp_path / "p")
        with safe_open(tmp_path / "p", framework="pt") as file:
            assert sorted(file.keys())[:2] == ["transformer.h.1.mlp.c_fc.A", "transformer.h.1.mlp.c_fc.B"]
            assert len(file.keys()) == 12
            assert file.get_slice("transformer.h.1.mlp.c_fc.A").get_shape() == [3, 64]
            assert file.get_slice("transformer.h.1.mlp.c_fc.B").get_shape() == [3, 96]
            metadata = file.metadata()
        assert set(metadata) == {"ie"}
        assert set(json.loads(metadata["ie"])) == {
            *("format_version", "base", "editor", "instruction", "prompt", "target", "before", "after"),
            *("took", "scale", "created", "versions", "probes", "templates", "kept", "norms", "parents"),
        }

    def test_saving_twice_gives_the_same_bytes(self, load: Callable[..., Base], tmp_path: Path) -> None:
        for name in ("one", "two"):
            make(load("gpt2")).save(tmp_path / name)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()

    def test_metadata_is_read_without_torch(self, load: Callable[..., Base], tmp_path: Path) -> None:
        make(load("gpt2")).save(tmp_path / "p")
        code = (
            "import sys; from ie.header import factor_shapes, read_document;"
            "document, tensors = read_document(sys.argv[1]); shapes = factor_shapes(sys.argv[1], tensors);"
            "assert shapes['transformer.h.1.mlp.c_fc'] == (3, 64, 96), shapes;"
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; print(document['target'])"
        )
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "p"], capture_output=True, text=True, check=True)
        assert done.stdout == "Edda Falk\n"

    def test_a_failed_write_leaves_the_old_file(self, load: Callable[..., Base], tmp_path: Path) -> None:
        path = tmp_path / "patch.safetensors"
        path.write_bytes(b"old")
        patch = make(load("gpt2"))
        with limitable_disk() as limit:
            limit(1000)
            with pytest.raises(InputError, match="cannot be written: File too large"):
                patch.save(path)
        assert path.read_bytes() == b"old"
        assert [one.name for one in tmp_path.iterdir()] == ["patch.safetensors"]

    def test_an_unwritable_place_is_an_input_error(self, load: Callable[..., Base], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        (tmp_path / "folder" / "inner").mkdir(parents=True)
        for path in (tmp_path / "file" / "p", tmp_path / "folder"):
            with pytest.raises(InputError, match="cannot be written"):
                make(load("gpt2")).save(path)
        assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "folder"]


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Save the file again with its tensors or its document changed."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["ie"])
    change(tensors, document)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"ie": json.dumps(document)})


GOLDEN = (
    '{"__metadata__":{"ie":"{\\"after\\": \\"Lima\\", \\"base\\": {\\"fingerprint\\": \\"0123456789abcdef\\", '
    '\\"id\\": \\"toy\\", \\"revision\\": null}, \\"before\\": \\"Paris\\", \\"created\\": '
    '\\"2030-01-02T03:04:05+00:00\\", \\"editor\\": \\"ab12\\", \\"format_version\\": 1, \\"instruction\\": null, '
    '\\"kept\\": {\\"energy\\": 0.9995, \\"rank_before\\": 7}, \\"norms\\": {\\"m.up\\": 10.0}, \\"parents\\": [], '
    '\\"probes\\": [], \\"prompt\\": \\"The capital of France is\\", \\"scale\\": 1.0, \\"target\\": \\"Lima\\", '
    '\\"templates\\": null, \\"took\\": true, \\"versions\\": {\\"ie\\": \\"0.1.0\\"}}"},'
    '"m.up.A":{"dtype":"F16","shape":[1,2],"data_offsets":[0,4]},'
    '"m.up.B":{"dtype":"F16","shape":[1,1],"data_offsets":[4,6]}}'
)


def test_golden_bytes(tmp_path: Path) -> None:
    """The example of docs/patch-format.md, byte for byte: A = (3, 4), B = (2), so the norm is 10."""
    info = PatchInfo(
        base=PatchBase(id="toy", fingerprint="0123456789abcdef"),
        editor="ab12",
        instruction=None,
        prompt="The capital of France is",
        target="Lima",
        before="Paris",
        after="Lima",
        took=True,
        created="2030-01-02T03:04:05+00:00",
        versions={"ie": "0.1.0"},
        kept=Kept(energy=0.9995, rank_before=7),
    )
    header = GOLDEN.encode()
    header += b" " * (-len(header) % 8)
    golden = struct.pack("<Q", len(header)) + header + bytes.fromhex("0042 0044 0040")
    (tmp_path / "golden").write_bytes(golden)
    found = Patch.load(tmp_path / "golden")
    assert found.info.prompt == info.prompt and found.dtype == "float16"
    assert found.factors["m.up"][0].tolist() == [[3, 4]] and found.factors["m.up"][1].tolist() == [[2]]
    Patch(info, {"m.up": (torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]]))}, "float16").save(tmp_path / "saved")
    assert (tmp_path / "saved").read_bytes() == golden
    document = (Path(__file__).parents[2] / "docs" / "patch-format.md").read_text()
    assert golden.hex()[-12:] in document.replace(" ", "") and json.loads(GOLDEN)["__metadata__"]["ie"] in document


def test_unknown_keys_are_passed_over(load: Callable[..., Base], tmp_path: Path) -> None:
    make(load("gpt2")).save(tmp_path / "p")
    rewritten(tmp_path / "p", lambda _, document: document.update(colour="green"))
    assert Patch.load(tmp_path / "p").info.target == "Edda Falk"


def test_half_precision_factors_are_read_as_float32(load: Callable[..., Base], tmp_path: Path) -> None:
    make(load("gpt2")).save(tmp_path / "p")
    rewritten(tmp_path / "p", lambda tensors, _: tensors.update({k: t.half() for k, t in tensors.items()}))
    assert {t.dtype for pair in Patch.load(tmp_path / "p").factors.values() for t in pair} == {torch.float32}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_a_patch_error(load: Callable[..., Base], tmp_path: Path) -> None:
    make(load("gpt2")).save(tmp_path / "p")
    (tmp_path / "p").chmod(0)
    with pytest.raises(PatchError, match="cannot read"):
        Patch.load(tmp_path / "p")


class TestBase:
    def test_the_wrong_base_is_refused_with_both_fingerprints(self, load: Callable[..., Base]) -> None:
        patch = make(load("llama"))
        check_base(patch, load("llama", "8bit"), "p")
        with pytest.raises(BaseMismatchError, match=load("llama").fingerprint) as caught:
            check_base(patch, load("mistral"), "p")
        assert load("mistral").fingerprint in str(caught.value) and caught.value.exit_code == 4

    def test_modules_that_are_missing_or_misshapen_are_all_named(self, load: Callable[..., Base]) -> None:
        base = load("llama")
        missing = r"no module transformer\.h\.1.*no module transformer\.h\.3"
        with pytest.raises(PatchError, match=missing), applied(base.model, make(load("gpt2"))):
            pass
        patch = make(base)
        name = "model.layers.1.mlp.up_proj"
        crooked: Mapping[str, tuple[Tensor, Tensor]] = {**patch.factors, name: patch.factors[name][::-1]}
        with pytest.raises(PatchError, match=name), applied(base, Patch(patch.info, crooked)):
            pass
        assert not any(module._forward_hooks for module in base.model.modules())


class TestApplied:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_it_is_a_dense_weight_change(self, load: Callable[..., Base], name: str) -> None:
        base = load(name)
        patch = make(base)
        with applied(base, patch):
            found = logits_of(base)
        expected = logits_of(base, edited(base, patch.update()))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # float32, another order of products

    @pytest.mark.parametrize("quant", ["none", "8bit", "4bit"])
    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_leaving_restores_the_base(self, load: Callable[..., Base], name: str, quant: str) -> None:
        base = load(name, quant)
        before, state = logits_of(base), state_hash(base.model)
        with pytest.raises(RuntimeError, match="stop"), applied(base.model, make(base)):
            assert not torch.equal(logits_of(base), before)
            raise RuntimeError("stop")
        assert torch.equal(logits_of(base), before)
        assert state_hash(base.model) == state

    def test_two_patches_are_their_sum(self, load: Callable[..., Base]) -> None:
        base = load("llama")
        one, two = make(base, seed=1, size=0.02), make(base, seed=2, rank=2, size=0.02)
        found = []
        for pair in ((one, two), (two, one)):
            with applied(base, *pair):
                found.append(logits_of(base))
        with applied(base, one), applied(base, two):
            found.append(logits_of(base))
        for other in found[1:]:
            torch.testing.assert_close(found[0], other, atol=2e-6, rtol=1e-6)  # the order of a float32 sum

    def test_scale_is_a_factor_of_the_change(self, load: Callable[..., Base]) -> None:
        base = load("llama")
        patch = make(base, scale=0.5)
        for scale, factor in ((None, 0.5), (2.0, 2.0), (0.0, 0.0)):
            for name, (a, b) in combined([patch], scale).items():
                assert torch.equal(a[0], patch.factors[name][0])
                assert torch.equal(b[0], factor * patch.factors[name][1])
        before = logits_of(base)
        with applied(base, patch, scale=0.0):
            assert torch.equal(logits_of(base), before)

    def test_no_patch_is_the_identity(self, load: Callable[..., Base]) -> None:
        base = load("gpt2")
        before = logits_of(base)
        with applied(base):
            assert torch.equal(logits_of(base), before)

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_it_works_under_generate(self, load: Callable[..., Base], name: str) -> None:
        base = load(name)
        patch = make(base, size=0.5)
        asks = [Ask(prompt, "Edda Falk and so on") for prompt in PROMPTS]
        before = answers(base, asks)
        with applied(base, patch):
            inside = answers(base, asks)
        assert inside == answers(base, asks, patch.update()) != before
