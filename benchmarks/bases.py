"""Base models to measure with: shapes of published ones, random weights, a real tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

__all__ = ["gpt2_small", "llama", "llama_7b", "save"]


def gpt2_small(n_blocks: int = 12) -> GPT2Config:
    """GPT-2 small, 124 M parameters with its 12 blocks."""
    return GPT2Config(n_layer=n_blocks)


def llama() -> LlamaConfig:
    """A Llama of 152 M parameters."""
    return LlamaConfig(
        vocab_size=50257,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=12,
        tie_word_embeddings=True,
    )


def llama_7b() -> LlamaConfig:
    """LLaMA-2-7B, 6.7 G parameters."""
    return LlamaConfig(intermediate_size=11008, max_position_embeddings=4096)


def save(config: Any, tokenizer: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a base model of this shape, random weights of seed 0, with the tokenizer of another folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)  # type: ignore[no-untyped-call]
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder
