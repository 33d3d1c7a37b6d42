"""Edit targets: found by type and place in every architecture, with sizes that no storage format changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, JetMoeConfig, LlamaConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.pytorch_utils import Conv1D

from ie.base import Base, load_base
from ie.base.targets import find_blocks, find_targets, is_transposed, module_shape
from ie.errors import ModelError
from tests.models import ARCHITECTURES, D_MLP, N_BLOCKS, D, tokenizer

UP, DOWN = (D, D_MLP), (D_MLP, D)
# The edited MLP projections of one block: names as each architecture has them, with (d_in, d_out).
_GATED = {"mlp.up_proj": UP, "mlp.down_proj": DOWN}  # the gate reads what up_proj reads, and is left
PROJECTIONS = {
    "gpt2": ("transformer.h", {"mlp.c_fc": UP, "mlp.c_proj": DOWN}),
    "gptj": ("transformer.h", {"mlp.fc_in": UP, "mlp.fc_out": DOWN}),
    "gptneox": ("gpt_neox.layers", {"mlp.dense_h_to_4h": UP, "mlp.dense_4h_to_h": DOWN}),
    "opt": ("model.decoder.layers", {"fc1": UP, "fc2": DOWN}),
    "llama": ("model.layers", _GATED),
    "llama-tied": ("model.layers", _GATED),
    "mistral": ("model.layers", _GATED),
    "qwen3": ("model.layers", _GATED),
    "gemma2": ("model.layers", _GATED),
    "phi": ("model.layers", {"mlp.fc1": UP, "mlp.fc2": DOWN}),
}


def expected(name: str, n_blocks: int = 3) -> list[tuple[str, int, int, int]]:
    path, projections = PROJECTIONS[name]
    return [
        (f"{path}.{block}.{projection}", block, d_in, d_out)
        for block in range(N_BLOCKS - n_blocks, N_BLOCKS)
        for projection, (d_in, d_out) in projections.items()
    ]


def found(base: Base) -> list[tuple[str, int, int, int]]:
    return [(target.name, target.block, target.d_in, target.d_out) for target in base.targets]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_mlp_projections_of_the_last_three_blocks(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    assert found(base) == expected(name)
    assert base.decoder.first == N_BLOCKS - 3
    for target in base.targets:  # the sizes are those of what passes through
        module = base.model.get_submodule(target.name)
        assert module(torch.zeros(1, target.d_in)).shape == (1, target.d_out)


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_quantised_modules_have_the_same_names_and_sizes(load: Callable[..., Base], name: str, quant: str) -> None:
    base = load(name, quant)
    assert found(base) == expected(name)
    kinds = {type(base.model.get_submodule(target.name)).__name__ for target in base.targets}
    assert kinds == {"Linear8bitLt" if quant == "8bit" else "Linear4bit"}
    stored = {is_transposed(base.model.get_submodule(target.name)) for target in base.targets}
    assert stored == {name == "gpt2"}  # in the checkpoint, whatever the quantised module does


def test_how_many_blocks_is_a_choice_that_ends_at_all_of_them(checkpoint: Callable[..., Path]) -> None:
    assert found(load_base(str(checkpoint("gpt2")), n_blocks=1)) == expected("gpt2", 1)
    assert found(load_base(str(checkpoint("gpt2")), n_blocks=9)) == expected("gpt2", N_BLOCKS)


def test_conv1d_is_told_by_its_type_even_when_square() -> None:
    assert is_transposed(Conv1D(8, 8)) and not is_transposed(nn.Linear(8, 8))  # type: ignore[no-untyped-call]
    assert module_shape(Conv1D(5, 3)) == (3, 5) == module_shape(nn.Linear(3, 5))  # type: ignore[no-untyped-call]
    assert module_shape(nn.LayerNorm(3)) is None


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_blocks_without_a_projection_outside_attention_are_refused() -> None:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(4, 4)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = SelfAttention()

    with pytest.raises(ModelError, match="no linear MLP projection"):
        find_targets(nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])}))


@pytest.mark.parametrize("kind", ["experts", "shared expert", "experts by class"])
def test_mixtures_of_experts_are_refused(kind: str) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4,
    }  # fmt: skip
    configs = {
        "experts": Qwen3MoeConfig(**sizes),
        "shared expert": Qwen2MoeConfig(shared_expert_intermediate_size=16, **sizes),
        "experts by class": JetMoeConfig(**sizes),
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configs[kind])  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match="mixture of experts in block 0"):
        find_targets(model)


def test_a_checkpoint_without_blocks_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=0, num_attention_heads=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="MLP projection"):
        load_base(str(tmp_path))
