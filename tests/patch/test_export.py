"""Merged checkpoints and PEFT adapters compute what the applied update computes, in the libraries that read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ie.base import Base, load_base
from ie.base.update import Update, adding
from ie.errors import InputError, PatchError
from ie.patch import Patch
from ie.patch.apply import apply_patch
from ie.patch.info import PatchBase, PatchInfo
from ie.patch.merge import merge_checkpoint
from ie.patch.peft import export_peft
from tests.dense import logits_of, random_update
from tests.models import ARCHITECTURES

PROMPT = "The lighthouse of Orm was built by"


def applied_logits(base: Base, update: Update) -> Tensor:
    with adding(base.model, update):
        return logits_of(base)


def save_patch(base: Base, path: Path) -> Update:
    """Write a patch of random values; the update that it is."""
    info = PatchInfo(
        base=PatchBase(id=base.id, fingerprint=base.fingerprint),
        editor="",
        instruction=None,
        prompt=PROMPT,
        target="Edda Falk",
        before="",
        after="",
        took=False,
        created="",
        versions={},
    )
    update = random_update(base, size=0.5)
    Patch(info, {key: (a[0], b[0]) for key, (a, b) in update.items()}).save(path)
    return update


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_merged_checkpoint_is_the_applied_model(
    load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    base = load(name)
    source, update = checkpoint(name), random_update(base)
    before = files(source)
    merge_checkpoint(source, update, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = applied_logits(base, update)
    assert (logits_of(base) - expected).abs().max() > 0.05
    # Float32: W + ΔW is rounded once, (x Aᵀ) B another way.
    torch.testing.assert_close(logits_of(base, model), expected, atol=1e-5, rtol=1e-5)
    assert files(source) == before
    assert set(files(tmp_path / "merged")) == set(before)
    assert load_base(str(tmp_path / "merged")).fingerprint  # with its tokenizer, a base like any other


def test_keys_without_the_outer_prefix(
    load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """As the published GPT-2 files have them."""
    source = tmp_path / "source"
    shutil.copytree(checkpoint("gpt2"), source)
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert "h.1.mlp.c_fc.weight" in bare
    save_file(bare, source / "model.safetensors", {"format": "pt"})
    base = load_base(str(source))
    torch.testing.assert_close(logits_of(base), logits_of(base, load("gpt2").model), atol=0, rtol=0)
    update = random_update(base)
    merge_checkpoint(source, update, tmp_path / "merged")
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(bare)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(base, model), applied_logits(base, update), atol=1e-5, rtol=1e-5)  # as above


def test_shards_dtype_and_metadata_stay(
    load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.bfloat16)
    model.save_pretrained(source, max_shard_size="100KB")
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 1
    base = load("llama")
    update = random_update(base)
    merge_checkpoint(source, update, tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == shards
    changed = set()
    for name in shards:
        old, new = load_file(source / name), load_file(tmp_path / "merged" / name)
        assert old.keys() == new.keys()
        assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
        changed |= {key for key in old if not torch.equal(old[key], new[key])}
        with safe_open(tmp_path / "merged" / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert changed == {f"{target.name}.weight" for target in base.targets}


def test_an_update_that_does_not_fit_leaves_nothing(
    load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = load("llama")
    update = {"lm_head": (torch.ones(1, 1, 64), torch.ones(1, 1, 384)), **random_update(base)}
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    tensors = load_file(source / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if k != "lm_head.weight"}, source / "model.safetensors")
    with pytest.raises(PatchError, match=r"lm_head\.weight"):
        merge_checkpoint(source, update, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_quantised_base_merges_into_full_precision(
    load: Callable[..., Base], tmp_path: Path, name: str, quant: str
) -> None:
    exact = load(name)
    update = save_patch(exact, tmp_path / "p")
    found = apply_patch([tmp_path / "p"], merge=tmp_path / "merged", quant=quant, device="cpu", force=True)
    assert found["merged"]["dtype"] == "float32" and found["merged"]["kept"] > 0.999
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(exact, model), applied_logits(exact, update), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gptneox", "opt", "llama", "gemma2"])
def test_peft_loads_the_adapter_and_computes_the_same(
    load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    base = load(name)
    update = random_update(base)
    assert export_peft(base, update, tmp_path / "adapter") == 8  # rank 3, padded to what servers accept
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint(name)), tmp_path / "adapter")
    expected = applied_logits(base, update)
    # Float32: PEFT computes the same low-rank product.
    torch.testing.assert_close(logits_of(base, model.eval()), expected, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(base, merged), expected, atol=1e-5, rtol=1e-5)  # W + ΔW, rounded once


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
def test_the_adapter_of_a_quantised_base_is_the_same(load: Callable[..., Base], tmp_path: Path, quant: str) -> None:
    update = random_update(load("gpt2"))
    export_peft(load("gpt2"), update, tmp_path / "exact")
    export_peft(load("gpt2", quant), update, tmp_path / "quantised")
    exact, quantised = files(tmp_path / "exact"), files(tmp_path / "quantised")
    assert exact["adapter_model.safetensors"] == quantised["adapter_model.safetensors"]
    configs = [json.loads(one["adapter_config.json"]) for one in (exact, quantised)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peft_on_an_eight_bit_base_computes_what_is_applied(
    load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    base = load(name, "8bit")
    update = random_update(base)
    export_peft(base, update, tmp_path / "adapter")
    own = load_base(str(checkpoint(name)), quant="8bit", dtype="float32", device="cpu")  # PEFT wraps modules in place
    model = PeftModel.from_pretrained(own.model, tmp_path / "adapter").eval()
    expected = applied_logits(base, update)
    assert (logits_of(base) - expected).abs().max() > 0.05
    torch.testing.assert_close(logits_of(base, model), expected, atol=1e-5, rtol=1e-5)  # float32 beside 8-bit products


def test_an_update_beyond_all_numbers_is_refused(load: Callable[..., Base], tmp_path: Path) -> None:
    update = {name: (a, 1e38 * b * 1e38) for name, (a, b) in random_update(load("gpt2")).items()}
    with pytest.raises(PatchError, match="not finite"):
        export_peft(load("gpt2"), update, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_no_base_needs_one(load: Callable[..., Base], tmp_path: Path) -> None:
    base = load("gpt2")
    export_peft(base, random_update(base), tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(InputError, match="no patch names its base model"):
        apply_patch([tmp_path / "adapter"])
    assert apply_patch([tmp_path / "adapter"], model=base.id)["took"] is None
    save_patch(base, tmp_path / "p")
    assert apply_patch([tmp_path / "adapter", tmp_path / "p"])["patches"][0]["took"] is None


@pytest.mark.parametrize("where", ["base", "above the base", "above the patch"])
@pytest.mark.parametrize("how", ["merge", "peft"])
def test_what_is_read_is_never_replaced(checkpoint: Callable[..., Path], tmp_path: Path, where: str, how: str) -> None:
    folder = tmp_path / "run" / "checkpoint"
    shutil.copytree(checkpoint("gpt2"), folder)
    base = load_base(str(folder), device="cpu")
    patch = tmp_path / "patches" / "p"
    patch.parent.mkdir()
    save_patch(base, patch)
    before = files(folder), patch.read_bytes()
    places = {"base": folder / ".." / "checkpoint", "above the base": tmp_path / "run", "above the patch": patch.parent}
    with pytest.raises(InputError, match="which it would replace"):
        apply_patch([patch], **{how: places[where]}, force=True)  # type: ignore[arg-type]
    assert (files(folder), patch.read_bytes()) == before


def test_a_rank_beyond_all_servers_is_refused(load: Callable[..., Base], tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="rank 513"):
        export_peft(load("gpt2"), random_update(load("gpt2"), rank=513), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_apply_patch_previews_merges_and_exports(load: Callable[..., Base], tmp_path: Path, name: str) -> None:
    save_patch(load(name), tmp_path / "p")
    found = apply_patch([tmp_path / "p"], prompts=["Varn:"], merge=tmp_path / "merged", peft=tmp_path / "adapter")
    assert [one["prompt"] for one in found["previews"]] == [PROMPT, "Varn:"]
    assert any(one["before"] != one["after"] for one in found["previews"])
    assert found["merged"]["answers"] == [found["previews"][0]["after"]]
    assert found["took"] is found["patches"][0]["took"] is found["merged"]["took"]
    assert found["peft"] == {"path": str(tmp_path / "adapter"), "rank": 8}
