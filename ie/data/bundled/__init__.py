"""Facts of our own, so that everything works without a download: true ones, invented ones, and opinions.

`bundled_records` makes the records of five tasks from them; `facts` and `opinions` are what the bundled base model
is trained on. The facts stand in general.yaml, the invented world's relations in invented.yaml, topics and phrases in
opinions.yaml. Loads no torch and takes about a tenth of a second.
"""

from __future__ import annotations

from .opinions import Opinion, opinions, question_wordings
from .records import bundled_records
from .world import Fact, Relation, facts, relations

__all__ = ["Fact", "Opinion", "Relation", "bundled_records", "facts", "opinions", "question_wordings", "relations"]
