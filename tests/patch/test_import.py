"""Adapters of other tools as patches, and exported adapters as their readers see them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from ie.base import Base
from ie.patch import applied
from ie.patch.apply import apply_patch
from ie.patch.live import combined
from ie.patch.peft import export_peft, import_peft, read_patch
from ie.servers import SERVERS, check_server
from tests.dense import logits_of, random_update
from tests.patch.test_patch import make

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"MLP": 2}, "alpha_pattern": {"MLP": 3}},
    "anchored": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"^MLP": 3, "^BLOCK.MLP": 2}},
}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")  # so they are meant here
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_adapter_that_peft_trained_is_the_same_as_a_patch(
    load: Callable[..., Base], checkpoint: Callable[..., Path], tmp_path: Path, name: str, options: str
) -> None:
    base = load(name)
    modules = ["c_fc", "c_attn"] if name == "gpt2" else ["up_proj", "q_proj"]
    block = "transformer.h.2" if name == "gpt2" else "model.layers.2"
    own = {
        key: {
            part.replace("MLP", f"mlp.{modules[0]}").replace("BLOCK", block): number for part, number in value.items()
        }
        if isinstance(value, dict)
        else value
        for key, value in OPTIONS[options].items()
    }
    config = LoraConfig(target_modules=modules, fan_in_fan_out=name == "gpt2", **own)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint(name)), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
        nn.init.normal_(parameter, std=0.1, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    expected = logits_of(base, model)
    patch = read_patch(tmp_path / "adapter")
    with applied(base, patch):
        found = logits_of(base)
    assert (found - logits_of(base)).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # float32, another order of products

    result = apply_patch(
        [tmp_path / "adapter"], model=base.id, dtype="float32", out=tmp_path / "p", merge=tmp_path / "m"
    )
    assert result["took"] is None and result["merged"]["took"] is None and result["merged"]["kept"] > 0.999
    again = read_patch(tmp_path / "p")  # now a patch file of that base
    assert again.info.base.fingerprint == base.fingerprint and again.info.prompt is None
    with applied(base, again):
        assert torch.equal(logits_of(base), found)


def test_export_then_import_is_the_update(load: Callable[..., Base], tmp_path: Path) -> None:
    base = load("llama")
    patch = make(base, scale=0.5)
    export_peft(base, patch.update(), tmp_path / "adapter", [patch.info])
    found = import_peft(tmp_path / "adapter")
    for name, (a, b) in combined([patch]).items():
        got_a, got_b = found.factors[name]
        assert got_a.shape[0] == 8  # padded
        torch.testing.assert_close(got_b.T @ got_a, b[0].T @ a[0], atol=0, rtol=1e-6)  # zero rows add nothing


def test_the_model_card_says_what_the_edit_changes(load: Callable[..., Base], tmp_path: Path) -> None:
    base = load("llama")
    info = make(base).info.model_copy(update={"target": "Edda | `Falk`\n# x"})
    export_peft(base, random_update(base), tmp_path / "adapter", [info])
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith("---\nbase_model: ") and "library_name: peft" in card
    assert r"| The lighthouse of Orm was built by | Ann Ot | Edda \| \`Falk\` \# x | Edda Falk | yes |" in card
    assert base.fingerprint in card and info.editor in card and "- `model.layers.1.mlp.up_proj`" in card
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8) and not config.get("rank_pattern")


@pytest.mark.parametrize(
    ("server", "model", "rank", "ends", "said"),
    [
        ("vllm", "llama", 16, ["up_proj"], "--enable-lora --lora-modules edit=DIR"),
        ("vllm", "llama", 32, ["up_proj"], "--max-lora-rank 32"),
        ("vllm", "gpt2", 8, ["c_fc"], None),
        ("vllm", "gptj", 8, ["fc_in"], None),
        ("sglang", "llama", 64, ["up_proj", "down_proj"], "--max-lora-rank 64 --lora-target-modules down_proj up_proj"),
        ("sglang", "gpt2", 8, ["c_fc"], None),
        ("llama.cpp", "llama", 8, ["up_proj"], "convert_lora_to_gguf.py DIR"),
        ("llama.cpp", "gpt2", 8, ["c_fc"], None),
    ],
)
def test_servers(server: str, model: str, rank: int, ends: list[str], said: str | None) -> None:
    found = check_server(server, model, rank, [f"model.layers.1.mlp.{end}" for end in ends], "DIR")
    assert server in SERVERS and found["takes"] is (said is not None)
    assert said in found["flags"] if said else "--merge" in found["reason"]
    assert said is None or rank > 16 or "--max-lora-rank" not in found["flags"] or server == "sglang"
