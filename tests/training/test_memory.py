"""The memory estimate: what can be counted is counted, and it holds against the measured peaks of processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

from benchmarks.survival import SERVER
from ie.base import Base
from ie.base.plan import plan_load
from ie.data.build import build
from ie.editor.editor import Editor, EditorSettings
from ie.errors import ModelError, NotEnoughMemoryError, is_out_of_memory
from ie.source import TOY_FOLDER
from ie.training.memory import enough_memory, estimate_memory
from ie.training.settings import TrainSettings


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_weights_and_editor_are_counted_exactly(
    name: str, checkpoint: Callable[..., Path], load: Callable[..., Base]
) -> None:
    found = estimate_memory(str(checkpoint(name)), plan_load("none", "float32", "cpu"))
    base, settings = load(name), TrainSettings()
    assert found["base"] == sum(p.nbytes for p in base.model.parameters())
    shape = EditorSettings(rank=settings.rank, n_layers=settings.n_layers)
    editor = Editor(base.targets, shape.for_tasks(6))
    n_bytes = sum(p.nbytes for p in editor.parameters())
    assert found["editor"] == 3 * n_bytes and found["optimiser"] == 2 * n_bytes
    parts = ("base", "activations", "editor", "optimiser", "prefix_store", "libraries")
    assert found["training"] == sum(found[part] for part in parts)


def test_what_makes_it_larger(checkpoint: Callable[..., Path]) -> None:
    name = str(checkpoint("llama"))
    full = estimate_memory(name, plan_load("none", "float32", "cpu"))
    eight, four = (estimate_memory(name, plan_load(quant, "float32", "cpu")) for quant in ("8bit", "4bit"))
    assert four["base"] < eight["base"] < full["base"]
    plan = plan_load("none", "float32", "cpu")
    larger = estimate_memory(name, plan, TrainSettings(batch_size=1024))
    assert larger["activations"] > 5 * full["activations"]
    joint = estimate_memory(name, plan, TrainSettings(method="instructedit-joint", batch_size=1024))
    assert joint["activations"] > larger["activations"]
    assert estimate_memory(name, plan, TrainSettings(steps=10))["prefix_store"] < full["prefix_store"]


BASES: dict[str, tuple[PreTrainedConfig, dict[str, int]]] = {
    # Weights are most of it.
    "gpt2": (
        GPT2Config(n_layer=5, n_embd=1024, n_head=8, n_inner=4096, vocab_size=24000, n_positions=256, bos_token_id=0,
                   eos_token_id=0),
        {"rank": 16, "n_validation": 4, "batch_size": 2, "n_fit": 4, "n_whitened": 8},
    ),
    # Activations are.
    "llama": (
        LlamaConfig(vocab_size=4000, hidden_size=512, intermediate_size=2048, num_hidden_layers=3,
                    num_attention_heads=8, bos_token_id=0, eos_token_id=0),
        {"rank": 32, "n_validation": 24, "batch_size": 8, "n_fit": 16},
    ),
    # Editor and optimiser are.
    "qwen3": (
        Qwen3Config(vocab_size=4000, hidden_size=640, intermediate_size=2560, num_hidden_layers=4, head_dim=80,
                    num_attention_heads=8, num_key_value_heads=4, bos_token_id=0, eos_token_id=0),
        {"rank": 1280, "n_validation": 4, "batch_size": 4, "n_fit": 4, "n_whitened": 8},
    ),
}  # fmt: skip


def peak_of(settings: TrainSettings, answer: Connection) -> None:
    """In a process of its own: train, and say how much it has held at most."""
    from ie.training.trainer import train

    answer.send(train(settings)["peak_memory_bytes"])


@pytest.fixture(scope="module")
def usual_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All bundled facts: enough validation records."""
    folder = tmp_path_factory.mktemp("usual") / "data"
    build(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_the_estimate_holds_against_a_process(name: str, tmp_path: Path, usual_data: Path) -> None:
    config, options = BASES[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")  # type: ignore[no-untyped-call]
    AutoTokenizer.from_pretrained(TOY_FOLDER).save_pretrained(tmp_path / "base")  # texts of usual length
    settings = TrainSettings.model_validate(
        {"model": str(tmp_path / "base"), "data": usual_data, "out": tmp_path / "editor", "steps": 1,
         "dtype": "float32", "quant": "none", "device": "cpu", **options}
    )  # fmt: skip
    answer, end = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=peak_of, args=(settings, end))
    process.start()
    end.close()  # a process that fails then ends the wait as well
    peak = answer.recv()
    process.join()
    found = estimate_memory(str(tmp_path / "base"), plan_load("none", "float32", "cpu"), settings)
    assert abs(found["training"] / peak - 1) < 0.25, (found, peak)


@pytest.mark.slow
def test_out_of_memory_ends_with_a_sentence(checkpoint: Callable[..., Path], dataset: Path, tmp_path: Path) -> None:
    """A process that may not have more than a little beyond what it has, for real."""
    code = (
        "import resource, sys, torch; from ie.cli.app import main; from ie.training import train;"
        "import ie.training.trainer as trainer; n = int(open('/proc/self/statm').read().split()[0]) * 4096;"
        "resource.setrlimit(resource.RLIMIT_AS, (n + 150_000_000,) * 2); main()"
    )
    args = ["train", "--model", checkpoint("llama"), "--data", dataset, "--out", tmp_path / "e", "--batch-size", 2000]
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.splitlines()[-2:]
    assert last[0].startswith("error: out of memory on cpu: this training needs about"), done.stderr
    assert last[1].startswith("hint: lower --batch-size (2000)") and "Traceback" not in done.stderr
    assert not (tmp_path / "e").exists()


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="other"), enough_memory("toy", plan_load(), TrainSettings()):
        raise RuntimeError("other")
    with pytest.raises(NotEnoughMemoryError, match="optimiser"), enough_memory("toy", plan_load(), TrainSettings()):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(ValueError("memory"))


def test_a_folder_without_a_configuration_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        estimate_memory(str(tmp_path), plan_load())
