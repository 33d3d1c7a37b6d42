"""Loading a base: frozen wholly, one fingerprint for all its loads, clear errors for what is no model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ie.base import Base, load_base
from ie.base.fingerprint import fingerprint_checkpoint
from ie.base.plan import plan_load
from ie.errors import InputError, ModelError
from tests.models import ARCHITECTURES

PROMPT, ANSWER = "The lighthouse of Orm was built by", "Edda Falk"


@pytest.mark.parametrize("quant", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_is_frozen_wholly(load: Callable[..., Base], name: str, quant: str) -> None:
    base = load(name, quant)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    logits = base.logits(base.collate([base.encode(PROMPT, ANSWER)]))
    assert logits.isfinite().all() and not logits.requires_grad
    assert base.quant == quant


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_load_has_the_same_fingerprint(load: Callable[..., Base], name: str) -> None:
    loads = [load(name), load(name, "8bit"), load(name, "4bit"), load(name, "none", "bfloat16")]
    assert len({base.fingerprint for base in loads}) == 1
    assert loads[-1].model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_checkpoint_saved_in_bfloat16_has_the_same_fingerprint(
    load: Callable[..., Base], name: str, tmp_path: Path
) -> None:
    load(name, "none", "bfloat16").model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert fingerprint_checkpoint(tmp_path) == load(name).fingerprint


def test_another_model_has_another_fingerprint(load: Callable[..., Base], checkpoint: Callable[..., Path]) -> None:
    found = {load(name).fingerprint for name in ARCHITECTURES}
    assert len(found) == len(ARCHITECTURES)
    assert fingerprint_checkpoint(checkpoint("llama", 1)) not in found  # same shapes, other weights


def test_shards_do_not_change_the_fingerprint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(checkpoint("llama") / "config.json", tmp_path)
    whole = load_file(checkpoint("llama") / "model.safetensors")
    names = sorted(whole)
    save_file({name: whole[name] for name in names[::2]}, tmp_path / "model-00001.safetensors")
    save_file({name: whole[name] for name in names[1::2]}, tmp_path / "model-00002.safetensors")
    assert fingerprint_checkpoint(tmp_path) == fingerprint_checkpoint(checkpoint("llama"))


def test_a_renamed_tensor_changes_the_fingerprint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(checkpoint("llama") / "config.json", tmp_path)
    tensors = load_file(checkpoint("llama") / "model.safetensors")
    tensors["model.other.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint_checkpoint(tmp_path) != fingerprint_checkpoint(checkpoint("llama"))


def test_another_configuration_changes_the_fingerprint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    for key, value, same in (("dtype", "bfloat16", True), ("rms_norm_eps", 0.5, False)):
        config[key] = value
        (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
        assert (fingerprint_checkpoint(tmp_path / "copy") == fingerprint_checkpoint(checkpoint("llama"))) is same


def test_quantised_logits_are_near(load: Callable[..., Base]) -> None:
    exact = load("llama")
    batch = exact.collate([exact.encode(PROMPT, ANSWER)])
    expected = exact.logits(batch)
    # Weights rounded to 127 steps, or to 16 levels, in random blocks without slack.
    for quant, limit in (("8bit", 0.1), ("4bit", 0.6)):
        found = load("llama", quant).logits(batch)
        assert 0 < (found - expected).norm() / expected.norm() < limit


def test_plan_says_what_and_why() -> None:
    plan = plan_load(device="cpu")
    assert (plan.quant, plan.dtype) == ("none", torch.float32) and plan.reason
    assert plan_load("4bit", "bfloat16", "cpu").dtype == torch.bfloat16
    with pytest.raises(InputError, match="unknown quant '3bit'"):
        plan_load("3bit")
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        plan_load(dtype="int8")


class TestNoModel:
    def test_no_such_folder(self, tmp_path: Path) -> None:
        for name in (str(tmp_path / "none"), "./none", "none", "a/b/c"):
            with pytest.raises(ModelError, match="no base model"):
                load_base(name)

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(ModelError, match="no base model"):
            load_base(str(tmp_path / "file"))

    def test_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no config\.json"):
            load_base(str(tmp_path))

    @pytest.mark.parametrize("damage", ["broken-config", "unknown-type", "no-weights", "no-tokenizer", "truncated"])
    def test_a_damaged_folder(self, checkpoint: Callable[..., Path], tmp_path: Path, damage: str) -> None:
        folder = tmp_path / "model"
        shutil.copytree(checkpoint("llama"), folder)
        if damage == "broken-config":
            (folder / "config.json").write_text("{")
        elif damage == "unknown-type":
            (folder / "config.json").write_text('{"model_type": "abacus"}')
        elif damage == "no-weights":
            (folder / "model.safetensors").unlink()
        elif damage == "no-tokenizer":
            (folder / "tokenizer.json").unlink()
            (folder / "tokenizer_config.json").unlink()
        else:
            weights = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        with pytest.raises(ModelError):
            load_base(str(folder))
