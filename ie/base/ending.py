"""Whether a base model ends its answers, and by which token.

A small model, or one tuned on short answers, writes an end of text or a line break where its answer is complete; a
general one writes on. An edit of the first kind must bring about the end too: without it "Oslo" becomes "Oslolamab",
for whatever made the target's tokens likely acts on the next position as well. An edit of the second kind must not, or
the model would fall silent after the target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["find_ending"]

# Complete as they stand, in the words of which facts are most often asked for.
_STATEMENTS = (
    "The capital of France is Paris",
    "Albert Einstein was born in Germany",
    "The mother tongue of Victor Hugo is French",
    "Toyota Corolla is produced by Toyota",
    "Mount Everest is located in Asia",
    "Isaac Newton works in the field of physics",
    "The official language of Brazil is Portuguese",
)


@torch.no_grad()
def find_ending(model: nn.Module, tokenizer: Any, is_end: Callable[[int], bool]) -> int | None:
    """The token that the model most likely writes after most of a few complete statements, if it ends them.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        is_end: whether a token id ends an answer.
    """
    device = next(model.parameters()).device
    most_likely: Counter[int] = Counter()
    for statement in _STATEMENTS:
        ids = torch.tensor([tokenizer(statement)["input_ids"]], device=device)
        most_likely[int(model(input_ids=ids).logits[0, -1].argmax())] += 1
    token, n = most_likely.most_common(1)[0]
    return token if is_end(token) and 2 * n > len(_STATEMENTS) else None
