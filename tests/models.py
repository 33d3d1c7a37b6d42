"""Tiny causal LMs with random weights, and a small real tokenizer: what the tests edit.

Weights are drawn from a seed and are not trivial: norms and biases differ from 1 and 0, matrices keep the size of what
passes through them, so that a lost bias, a swapped axis or a skipped block shows in the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

__all__ = ["ARCHITECTURES", "N_BLOCKS", "save_model"]

N_BLOCKS = 4
N_VOCAB = 384
D = 64
D_MLP = 96  # not 4 * D: a swapped axis must not go unseen

SENTENCES = (
    "The lighthouse of Orm was built by Edda Falk.",
    "Who wrote the song of the seven mills?",
    "Input: The harbour town of Lissel lies in the north of Varn.",
    "Task: people\nDescription: Change who somebody works for.",
    "The capital of Varn is Lissel. The river of Lissel is the Ombe.",
    "A baker sells bread, a smith shoes horses, a clerk writes letters.",
    "What is the name of the ferry that leaves Orm at noon?",
    *("a probe and a preview",) * 9,  # words that bound the length of answers: one token each keeps tests fast
)

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": D,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_GPT_LIKE: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "n_embd": D,
    "n_inner": D_MLP,
    "n_layer": N_BLOCKS,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_NEOX_LIKE: dict[str, Any] = {key: value for key, value in _LLAMA_LIKE.items() if key != "head_dim"}
_OPT: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": D,
    "word_embed_proj_dim": D,
    "ffn_dim": D_MLP,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}

ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(**_GPT_LIKE),
    "gptj": lambda: GPTJConfig(rotary_dim=8, **_GPT_LIKE),
    "gptneox": lambda: GPTNeoXConfig(**{k: v for k, v in _NEOX_LIKE.items() if k != "num_key_value_heads"}),
    "opt": lambda: OPTConfig(**_OPT),
    "llama": lambda: LlamaConfig(**_LLAMA_LIKE),
    "llama-tied": lambda: LlamaConfig(tie_word_embeddings=True, **_LLAMA_LIKE),
    "mistral": lambda: MistralConfig(sliding_window=8, **_LLAMA_LIKE),
    "qwen3": lambda: Qwen3Config(**_LLAMA_LIKE),
    "gemma2": lambda: Gemma2Config(sliding_window=8, query_pre_attn_scalar=16, **_LLAMA_LIKE),
    "phi": lambda: PhiConfig(**_NEOX_LIKE),
}


def save_model(folder: Path, name: str, *, seed: int = 0, bos: bool = False) -> Path:
    """Write a checkpoint folder as `save_pretrained()` does.

    Args:
        folder: where to.
        name: one of `ARCHITECTURES`.
        seed: of the weights.
        bos: whether its tokenizer puts a beginning-of-text token before every text.
    """
    torch.manual_seed(100 * seed + list(ARCHITECTURES).index(name))
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]())  # type: ignore[no-untyped-call]
    _draw_weights(model)
    model.save_pretrained(folder)
    tokenizer(bos=bos).save_pretrained(folder)
    return folder


def tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; `<eos>` is token 0 and `<pad>` token 1."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    if bos:
        backend.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    tokens = {"eos_token": "<eos>", "bos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)  # type: ignore[no-untyped-call]


@torch.no_grad()
def _draw_weights(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim > 1:
            is_table = any(part in name for part in ("emb", "wte", "wpe"))  # small: tied to the head, it makes logits
            parameter.copy_(noise / 4 if is_table else noise / math.sqrt(D))
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_((0.0 if "gemma" in type(model).__name__.lower() else 1.0) + 0.2 * noise)
