"""Whether a server takes a patch's adapter, with the flags to use, or why not. Rules that were known when written."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

__all__ = ["SERVERS", "check_server"]

SERVERS = ("vllm", "sglang", "llama.cpp")

_DEFAULT_VLLM_RANK = 16
_MERGE = "merge the patch instead (`--merge`) and serve the checkpoint"
_TRANSPOSED = "its weights are stored the other way round (Conv1D), which the converter of adapters does not expect"
_NO_LORA: dict[str, dict[str, str]] = {
    "vllm": dict.fromkeys(("gpt2", "gptj"), "vLLM has no LoRA for this architecture"),
    "sglang": {},
    "llama.cpp": {"gpt2": _TRANSPOSED},
}
_LLAMA_LIKE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def check_server(server: str, model_type: str, rank: int, modules: Collection[str], folder: str) -> dict[str, Any]:
    """Say whether a server takes an adapter.

    Args:
        server: one of `SERVERS`.
        model_type: the base's, as its config.json has it.
        rank: the adapter's padded rank.
        modules: paths of the modules that it changes.
        folder: where the adapter lies, for the commands.

    Returns:
        `server`, `takes`, and either `flags` or `reason`.
    """
    reason = _NO_LORA[server].get(model_type)
    ends = {name.rpartition(".")[2] for name in modules}
    if reason is None and server == "sglang" and not ends <= _LLAMA_LIKE:
        reason = f"SGLang has no LoRA for {', '.join(sorted(ends - _LLAMA_LIKE))}"
    if reason is not None:
        return {"server": server, "takes": False, "reason": f"{model_type}: {reason}; {_MERGE}", "flags": None}
    return {"server": server, "takes": True, "reason": None, "flags": _flags(server, rank, sorted(ends), folder)}


def _flags(server: str, rank: int, ends: list[str], folder: str) -> str:
    if server == "vllm":
        more = f" --max-lora-rank {rank}" if rank > _DEFAULT_VLLM_RANK else ""
        return f"vllm serve BASE --enable-lora --lora-modules edit={folder}{more}"
    if server == "sglang":
        return (
            f"python -m sglang.launch_server --model-path BASE --lora-paths edit={folder} "
            f"--max-lora-rank {rank} --lora-target-modules {' '.join(ends)}"
        )
    return f"convert_lora_to_gguf.py {folder} --base BASE --outfile e.gguf; llama-server -m base.gguf --lora e.gguf"
