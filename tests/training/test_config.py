"""Configurations: read, refused, written beside the editor; and the ready ones, each on a base of its architecture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ie.cli.app import app
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)
from typer.testing import CliRunner

from ie.base.plan import meta_model, plan_load
from ie.base.targets import find_targets
from ie.editor.files import load_info
from ie.errors import InputError
from ie.training import TrainSettings, train
from ie.training.config import config_text, find_config, read_config, ready_configs
from ie.training.memory import estimate_memory
from tests.models import N_VOCAB, tokenizer

LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip
SHAPES: dict[str, PreTrainedConfig] = {
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "llama-2-7b": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, rope_parameters=LLAMA_3, max_position_embeddings=131072,
    ),
    "qwen3-8b": Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    ),
    "mistral-7b": MistralConfig(
        vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, sliding_window=None,
    ),
}  # fmt: skip


def narrow(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture with few, narrow layers."""
    sizes = {
        "vocab_size": N_VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "n_embd": 64, "n_layer": 4, "n_head": 4,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    whole = {name: value for name, value in config.to_dict().items() if name != "layer_types"}
    return type(config)(**whole | {name: value for name, value in sizes.items() if name in whole})


def test_all_ready_configurations_are_tested() -> None:
    assert set(ready_configs()) == {*SHAPES, "published-facts"}


@pytest.mark.parametrize("name", SHAPES)
def test_a_ready_configuration_passes_its_dry_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the base's whole shape; and what its comments promise is so."""
    monkeypatch.chdir(tmp_path)
    SHAPES[name].save_pretrained(tmp_path / "base")
    result = CliRunner().invoke(app, ["train", "--config", name, "--model", "base", "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["quant"], found["dtype"]) == ("8bit", "bfloat16") and found["seconds_estimate"] > 0
    assert found["config"]["rank"] == read_config(find_config(name))["rank"]
    assert [path.name for path in tmp_path.iterdir()] == ["base"]  # nothing is trained, nothing written
    about = find_config(name).read_text()
    targets = find_targets(meta_model(str(tmp_path / "base")))
    assert found["targets"] == [target.name for target in targets]
    assert f"blocks {targets[0].block} to {targets[-1].block}" in about
    assert all(re.sub(r".*\.\d+\.", "", target.name) in about for target in targets)
    settings = TrainSettings.model_validate(found["config"])
    on_gpu = estimate_memory("base", plan_load("8bit", "bfloat16", "cuda"), settings)["training"]
    (promised,) = re.findall(r"about ([\d.]+) GB", about)
    assert float(promised) == pytest.approx(on_gpu / 1e9, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_ready_configuration_trains_in_8_bits(name: str, tmp_path: Path, dataset: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(narrow(SHAPES[name])).save_pretrained(tmp_path / "base")  # type: ignore[no-untyped-call]
    tokenizer().save_pretrained(tmp_path / "base")
    here = {"model": str(tmp_path / "base"), "data": dataset, "out": tmp_path / "editor", "device": "cpu", "steps": 3}
    short = {"n_fit": 4, "n_validation": 2, "batch_size": 4}
    result = train(TrainSettings.model_validate(read_config(find_config(name)) | here | short))
    assert result["steps"] == 3 and result["episodes"] == 12
    info = load_info(tmp_path / "editor")
    assert info.base.quant == "8bit" and info.training["dtype"] == "bfloat16"
    written = yaml.safe_load((tmp_path / "editor" / "config.yaml").read_text())
    assert written["steps"] == 3 and written["quant"] == "8bit"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_configuration_for_published_facts_trains_any_base(
    name: str, checkpoint: Callable[..., Path], dataset: Path, tmp_path: Path
) -> None:
    values = read_config(find_config("published-facts"))
    assert not {"model", "quant", "dtype"} & values.keys()
    here = {"model": str(checkpoint(name)), "data": dataset, "out": tmp_path / "editor", "device": "cpu"}
    result = train(TrainSettings.model_validate(values | here | {"n_fit": 4, "steps": 3}))
    assert result["steps"] == result["best_step"] == 3  # the last editor is kept
    assert result["episodes"] == 3 * values["batch_size"]


def test_a_written_configuration_gives_the_same_settings(tmp_path: Path) -> None:
    settings = TrainSettings(tasks=("people",), holdout=(), minutes=2.5, patience=None, rank=7, model="x/y")
    (tmp_path / "c.yaml").write_text(config_text(settings, {"ie": "0"}))
    assert TrainSettings.model_validate(read_config(tmp_path / "c.yaml")) == settings


def test_unknown_keys_are_all_named_with_what_was_meant(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("stepz: 3\nbatch-sise: 2\nrank: 3\n")
    with pytest.raises(InputError, match="unknown keys: stepz, batch_sise") as found:
        read_config(tmp_path / "c.yaml")
    assert found.value.hint == "did you mean 'steps'? did you mean 'batch_size'?"


def test_a_plan_for_a_machine_with_a_gpu_needs_none(checkpoint: Callable[..., Path]) -> None:
    args = ["train", "--model", str(checkpoint("gpt2")), "--device", "cuda", "--dry-run"]
    found = json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)
    assert (found["device"], found["quant"], found["seconds_estimate"]) == ("cuda", "8bit", None)
    assert found["memory_estimate"]["training"] > 0
    assert "not known here" in CliRunner().invoke(app, args).stdout


def test_a_folder_of_the_same_name_hides_no_ready_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpt2-xl").mkdir()
    assert find_config("gpt2-xl") == ready_configs()["gpt2-xl"]


def test_an_unknown_name_is_told_the_ready_ones() -> None:
    with pytest.raises(InputError, match="no ready configuration") as found:
        find_config("llama-2-7")
    assert found.value.hint and found.value.hint.startswith("did you mean 'llama-2-7b'?")


def test_a_configuration_in_a_file_goes_through_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = TrainSettings.model_validate(options)
    Path("c.yaml").write_text(config_text(settings, {}))
    result = CliRunner().invoke(app, ["train", "--config", "c.yaml", "--rank", "5", "--dry-run", "--json"])
    assert result.exit_code == 2  # rank is no flag
    result = CliRunner().invoke(app, ["train", "--config", "c.yaml", "--steps", "5", "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["config"] == settings.model_copy(update={"steps": 5}).model_dump(
        mode="json", exclude={"force", "resume"}
    )


@pytest.fixture(params=[{}, {"holdout": [], "tasks": ["people", "places"], "patience": None, "balance": False}])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found
