"""Merging: rounding is measured and caught, memory is bounded, what is written is whole or not there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ie.base import Base, load_base
from ie.base.asking import Ask, answers
from ie.editor.methods import finetune_method
from ie.editor.request import EditRequest
from ie.errors import EditFailedError, ModelError, NotEnoughMemoryError, PatchError
from ie.patch.apply import apply_patch
from ie.patch.info import PatchBase
from ie.patch.merge import merge_checkpoint
from ie.patch.shards import Change, rewrite
from tests.dense import random_update
from tests.patch.edits import PROMPT, TAKES_ON, TARGET, taking


@pytest.fixture
def narrow(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """The checkpoint that edits take on, in bf16, in three shards at least."""
    folder = tmp_path / "narrow"
    model = AutoModelForCausalLM.from_pretrained(checkpoint(TAKES_ON), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="90KB")
    AutoTokenizer.from_pretrained(checkpoint(TAKES_ON)).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


def made_for(narrow: Path, load: Callable[..., Base], path: Path) -> Path:
    """The patch that takes, as one of the checkpoint in bf16."""
    patch = taking(load)
    base = load_base(str(narrow), dtype="float32")
    info = patch.info.model_copy(update={"base": patch.info.base.model_copy(update={"fingerprint": base.fingerprint})})
    type(patch)(info, patch.factors).save(path)
    return path


def answer(folder: Path) -> str:
    return answers(load_base(str(folder), dtype="float32"), [Ask(PROMPT, TARGET)])[0]


def test_a_sharded_checkpoint_answers_the_target_in_plain_transformers(
    load: Callable[..., Base], narrow: Path, tmp_path: Path
) -> None:
    patch = made_for(narrow, load, tmp_path / "p")
    found = apply_patch([patch], model=str(narrow), merge=tmp_path / "merged")
    assert found["merged"]["took"] and found["merged"]["dtype"] == "bfloat16" and found["merged"]["n_tensors"] == 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip().startswith(TARGET)  # and no end
    assert {path.name for path in narrow.iterdir()} == {path.name for path in (tmp_path / "merged").iterdir()}


def test_how_much_rounding_leaves_is_what_is_known_of_it(tmp_path: Path) -> None:
    """Of a Gaussian change of a Gaussian weight, by dtype and by ‖ΔW‖ / ‖W‖."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator)
    left, right = torch.randn(16, 256, generator=generator), torch.randn(16, 256, generator=generator)
    for dtype, shares in (("bfloat16", (0.55, 0.20, 0.07)), ("float16", (1.00, 0.88, 0.47)), ("float32", (1, 1, 1))):
        save_file({"m.weight": weight.to(getattr(torch, dtype))}, tmp_path / "w")
        for ratio, share in zip((1e-3, 3e-4, 1e-4), shares, strict=True):
            size = ratio * weight.norm() / (left.T @ right).norm()
            found = rewrite(tmp_path / "w", tmp_path / "out", {"m.weight": Change(left * size, right)})["m.weight"]
            assert found.kept / found.energy == pytest.approx(share, abs=0.04), (dtype, ratio)  # one draw of weights


def test_an_edit_that_rounding_eats_is_caught(
    load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Large weights that cancel in pairs: what is computed is the same, but a step of bf16 is larger than the edit."""
    source, patch = coarse(load, checkpoint, tmp_path)
    with pytest.raises(EditFailedError, match=r"rounding to bfloat16 leaves \d+% of the edit") as caught:
        apply_patch([patch], model=str(source), merge=tmp_path / "merged", dtype="auto")
    assert caught.value.exit_code == 3 and "--dtype float32" in (caught.value.hint or "")
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))
    forced = apply_patch([patch], model=str(source), merge=tmp_path / "merged", force=True)
    assert forced["took"] and not forced["merged"]["took"] and forced["merged"]["kept"] < 0.5
    assert answer(tmp_path / "merged") != TARGET
    wide = apply_patch([patch], model=str(source), merge=tmp_path / "wide", dtype="float32")
    assert wide["merged"]["took"] and wide["merged"]["kept"] == pytest.approx(1, abs=1e-3)
    assert answer(tmp_path / "wide") == TARGET
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto")
    assert model.dtype == torch.float32


def test_a_merged_checkpoint_that_does_not_fit_is_said_and_not_kept(
    load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking(load).save(tmp_path / "p")

    def load_once(name: str, **options: Any) -> Base:
        if name.startswith(str(tmp_path)):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return load_base(name, **options)

    monkeypatch.setattr("ie.patch.apply.load_base", load_once)
    with pytest.raises(NotEnoughMemoryError, match="a merged checkpoint is asked") as caught:
        apply_patch([tmp_path / "p"], model=str(checkpoint(TAKES_ON)), merge=tmp_path / "merged", device="cpu")
    assert "--device cpu" in (caught.value.hint or "") and not (tmp_path / "merged").exists()


def coarse(load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A bf16 checkpoint whose edited weights are so large that an edit which takes is less than half a step of them.

    Each MLP gets its hidden units twice, the second time with the output weights' sign turned, plus a large constant
    on both: `down @ h` cancels to what it was, while every weight of `down` is near that constant.
    """
    source = tmp_path / "coarse"
    shutil.copytree(checkpoint(TAKES_ON), source)
    config = json.loads((source / "config.json").read_text())
    width = config["intermediate_size"]
    config.update(intermediate_size=2 * width, dtype="bfloat16")
    (source / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = torch.cat((tensor, tensor))
        elif "down_proj" in name:
            # exact in bf16: 64 and -64, and what the block computed stays in the first half's own part
            tensors[name] = torch.cat((tensor + 64, torch.full_like(tensor, -64)), 1)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, source / "model.safetensors", {"format": "pt"}
    )
    base = load_base(str(source), dtype="float32")
    for rate in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6):
        update = finetune_method(rate)(base, [EditRequest(PROMPT, TARGET)])
        kept = {name: pair for name, pair in update.items() if "down_proj" in name}
        if answers(base, [Ask(PROMPT, TARGET)], kept)[0] == TARGET:
            break
    else:
        raise AssertionError("no rate takes")
    patch = taking(load)
    info = patch.info.model_copy(update={"base": PatchBase(id=base.id, fingerprint=base.fingerprint)})
    type(patch)(info, {name: (a[0].detach(), b[0].detach()) for name, (a, b) in kept.items()}).save(tmp_path / "p")
    return source, tmp_path / "p"


def test_a_wider_dtype_of_a_sharded_checkpoint(load: Callable[..., Base], narrow: Path, tmp_path: Path) -> None:
    update = random_update(load(TAKES_ON))
    merged = merge_checkpoint(narrow, update, tmp_path / "wide", dtype="float32")
    assert merged.dtype == "float32" and merged.kept == pytest.approx(1, abs=1e-5)
    sizes = 0
    for old in sorted(narrow.glob("*.safetensors")):
        new = tmp_path / "wide" / old.name
        before, after = load_file(old), load_file(new)
        sizes += new.stat().st_size
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}
        for name, tensor in before.items():
            assert name.removesuffix(".weight") in update or torch.equal(tensor.float(), after[name])
    index = json.loads((tmp_path / "wide" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sizes
    assert index["weight_map"] == json.loads((narrow / "model.safetensors.index.json").read_text())["weight_map"]


def test_pickled_twins_of_the_weights_are_not_copied(
    load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "source")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pth"):
        (tmp_path / "source" / name).write_bytes(b"the same weights, unedited")
    merge_checkpoint(tmp_path / "source", random_update(load("llama")), tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {p.name for p in checkpoint("llama").iterdir()}


def test_a_shared_weight_is_not_merged(
    load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    update = {"lm_head": (torch.ones(1, 1, 64), torch.ones(1, 1, 384))}
    with pytest.raises(PatchError, match="lm_head shares its weight"):
        merge_checkpoint(checkpoint(TAKES_ON), update, tmp_path / "merged")
    merge_checkpoint(checkpoint("llama"), update, tmp_path / "merged")  # there it has one of its own


def test_what_overflows_is_refused(load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    update = random_update(load("llama"), size=1e5)
    with pytest.raises(PatchError, match="not finite in float16"):
        merge_checkpoint(checkpoint("llama"), update, tmp_path / "merged", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_lone_number_or_one_that_was_infinite_is_no_overflow(tmp_path: Path) -> None:
    """As old exports hold them for masks."""
    tensors = {"mask": torch.tensor(-1e9), "bias": torch.tensor([-torch.inf, 1.0]), "w": torch.ones(4, 3)}
    save_file(tensors, tmp_path / "in")
    rewrite(tmp_path / "in", tmp_path / "out", {"w": Change(torch.ones(1, 4), torch.ones(1, 3))}, "float16")
    found = load_file(tmp_path / "out")
    assert found["mask"].isinf() and torch.equal(found["bias"], tensors["bias"].half())
    assert torch.equal(found["w"], torch.full((4, 3), 2.0).half())


def test_what_overflows_beside_the_edit_is_refused(
    load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoint("llama"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(PatchError, match=r"model\.norm\.weight is not finite in float16"):
        merge_checkpoint(source, random_update(load("llama")), tmp_path / "merged", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "missing.safetensors"])
def test_an_index_that_leads_out_of_its_folder(
    load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    source = tmp_path / "inner" / "source"
    shutil.copytree(checkpoint("llama"), source)
    shutil.move(source / "model.safetensors", tmp_path / "inner" / "model.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"w": name}}))
    for use in (lambda: load_base(str(source)), lambda: merge_checkpoint(source, {}, tmp_path / "merged")):
        with pytest.raises(ModelError, match="names files that are not in its folder"):
            use()
    (source / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="is no index"):
        load_base(str(source))


def test_a_quantised_checkpoint_is_refused(
    load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    tensors = load_file(source / "model.safetensors")
    packed = {name: (tensor * 9).to(torch.int8) if "mlp" in name else tensor for name, tensor in tensors.items()}
    save_file(packed, source / "model.safetensors")
    with pytest.raises(PatchError, match=r"is I8 .*, expected floats of shape") as caught:
        merge_checkpoint(source, random_update(load("llama")), tmp_path / "merged")
    assert "full-precision" in (caught.value.hint or "")
    assert not (tmp_path / "merged").exists()


PEAK = """
import sys
from pathlib import Path
import torch
from ie.base.targets import find_targets
from ie.base.plan import meta_model
from ie.patch.merge import merge_checkpoint
def merge(source, out):
    targets = find_targets(meta_model(str(source)))
    update = {t.name: (torch.ones(1, 4, t.d_in), torch.ones(1, 4, t.d_out)) for t in targets}
    for dtype in (None, "bfloat16"):
        merge_checkpoint(source, update, out / f"{source.name}-{dtype}", dtype=dtype)
def peak():  # of this process alone: getrusage has that of the process which started it, too
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
small, large, out = map(Path, sys.argv[1:])
merge(small, out)  # libraries' code and its first use
before = peak()
merge(large, out)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read where Linux writes it")
def test_memory_does_not_grow_with_the_shards(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source", max_shard_size="70MB")
    shards = [path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors")]
    assert len(shards) >= 3 and max(shards) > 50e6
    command = [sys.executable, "-c", PEAK, str(checkpoint("llama")), str(tmp_path / "source"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.9 * max(shards)  # a shard in memory would be 1 beside the rest
