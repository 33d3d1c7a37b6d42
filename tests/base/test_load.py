"""Loading a base: frozen wholly, one fingerprint for all its loads, clear errors for what is no model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ie.base import Base, load_base
from ie.base.fingerprint import INDEX, fingerprint_checkpoint
from ie.base.plan import plan_load
from ie.errors import InputError, ModelError
from ie.patch.peft import export_peft
from tests.dense import random_update
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
    files = {name: f"model-0000{i % 2 + 1}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: whole[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    save_file({"other": torch.ones(2)}, tmp_path / "consolidated.safetensors")  # the same weights in another format
    assert fingerprint_checkpoint(tmp_path) == fingerprint_checkpoint(checkpoint("llama"))


def test_a_file_beside_the_checkpoint_does_not_change_the_fingerprint(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "copy")
    save_file({"other": torch.ones(2)}, folder / "consolidated.safetensors")
    assert fingerprint_checkpoint(folder) == fingerprint_checkpoint(checkpoint("llama"))


def test_a_scalar_counts(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Old exports of GPT-J and GPT-NeoX hold one for each block."""
    found = set()
    for value in (1.0, -1e9):
        folder = shutil.copytree(checkpoint("gptneox"), tmp_path / str(value))
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "bias": torch.tensor(value)}, folder / "model.safetensors")
        found.add(fingerprint_checkpoint(folder))
    assert len(found) == 2


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
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        plan_load(device="gpu")
    assert plan_load(device="cuda:99").quant == "8bit"  # of another machine: estimates need no GPU
    with pytest.raises(InputError, match="no device 'cuda:99'"):
        load_base(device="cuda:99")


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

    @pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
    @pytest.mark.parametrize("quant", ["none", "8bit", "4bit"])
    @pytest.mark.parametrize("damage", ["lost", "cut"])
    def test_weights_that_are_not_there_are_never_drawn(
        self, checkpoint: Callable[..., Path], tmp_path: Path, name: str, quant: str, damage: str
    ) -> None:
        folder = shutil.copytree(checkpoint(name), tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        which = next(key for key in sorted(tensors) if "mlp" in key and key.endswith("weight"))
        whole = tensors.pop(which)
        if damage == "cut":
            tensors[which] = whole[:-1].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=re.escape(which)):
            load_base(str(folder), quant=quant, device="cpu")

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

    @pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
    def test_its_own_code_is_neither_run_nor_offered(
        self, checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
    ) -> None:
        folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        own = {"auto_map": {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None]}}
        content = json.loads((folder / where).read_text()) | own
        content |= {"model_type": "own"} if where == "config.json" else {"tokenizer_class": "OwnTokenizer"}
        (folder / where).write_text(json.dumps(content))
        with pytest.raises(ModelError, match="custom code"):
            load_base(str(folder), device="cpu")
        assert not (tmp_path / "ran").exists() and capsys.readouterr().out == ""  # transformers would ask on stdout

    def test_an_adapter_beside_the_weights_is_not_put_on_top(
        self, checkpoint: Callable[..., Path], load: Callable[..., Base], tmp_path: Path
    ) -> None:
        folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
        export_peft(load("llama"), random_update(load("llama")), tmp_path / "adapter")
        shutil.copytree(tmp_path / "adapter", folder, dirs_exist_ok=True)
        with pytest.raises(ModelError, match="adapter_config"):
            load_base(str(folder), device="cpu")


def test_a_folder_in_the_home_is_found(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_base("~/model", device="cpu").id == str(tmp_path / "model")


def test_a_hub_id_is_found_in_the_hubs_cache(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, commit = tmp_path / "models--owner--name", "0123456789" * 4
    shutil.copytree(checkpoint("llama"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = load_base("owner/name", device="cpu")
    assert (base.id, base.revision) == ("owner/name", commit)
    with pytest.raises(ModelError, match="could not be fetched from the hub"):
        load_base("owner/other", device="cpu")
