"""Invented records in the shape of every layout, and small helpers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FACT = {"subject": "Ulmarket", "prompt": "The mayor of Ulmarket is"}
ZSRE = {
    "subject": "Tovi Arrend",
    "src": "Which town was Tovi Arrend born in?",
    "rephrase": "Where was Tovi Arrend born?",
    "pred": "Ulmarket",
    "alt": " Pellsund ",
    "loc": "nq question: who painted the blue gate",
    "loc_ans": "Mara Quill",
}

# Layout name -> a list of two records in its shape: the first whole, the second to be skipped (None: nothing to skip).
EXCERPTS: dict[str, list[dict[str, Any]]] = {
    "EasyEdit CounterFact": [
        {
            **FACT,
            "case_id": 7,
            "target_new": " Tovi Arrend",
            "ground_truth": "Sella Brook",
            "rephrase_prompt": "Ulmarket is governed by",
            "locality_prompt": "The mayor of Pellsund is",
            "locality_ground_truth": "Sella Brook",
        },
        {**FACT, "case_id": 8, "target_new": " ", "ground_truth": "Sella Brook"},
    ],
    "ROME": [
        {
            "case_id": 7,
            "requested_rewrite": {
                "prompt": "The mayor of {} is",
                "subject": "Ulmarket",
                "target_new": {"str": "Tovi Arrend", "id": "Q1"},
                "target_true": {"str": "Sella Brook", "id": "Q2"},
            },
            "paraphrase_prompts": ["Rain fell. Ulmarket is governed by", "Ulmarket is led by"],
            "neighborhood_prompts": ["The mayor of Pellsund is", "The mayor of Narrowby is"],
            "attribute_prompts": ["The mayor of Oxfell is"],
        },
        {"case_id": 8, "requested_rewrite": {"prompt": "{} is", "subject": "", "target_new": {"str": "x"}}},
    ],
    "KnowEdit": [
        {
            **FACT,
            "target_new": "Tovi Arrend",
            "ground_truth": [["Sella Brook", "S. Brook"], ["Ann Ot"]],
            "rephrase_prompt": "Ulmarket is governed by",
            "portability": {"Reasoning": [{"prompt": "The mayor of Ulmarket lives in", "ground_truth": "Pellsund"}]},
            "locality": {
                "Relation_Specificity": [{"prompt": "Ulmarket lies in", "ground_truth": [["Vell", "the Vell"]]}],
                "Forgetfulness": [
                    {"prompt": "The mayor of Ulmarket, which is not Tovi Arrend, is", "ground_truth": ["Sella Brook"]},
                    {"prompt": "Nothing is known of", "ground_truth": []},
                ],
            },
        },
        {**FACT, "target_new": "Sella Brook", "ground_truth": "Sella Brook", "locality": {}, "portability": {}},
    ],
    "ZsRE-MEND": [ZSRE, {**ZSRE, "alt": "Ulmarket"}],
    "ZsRE-MEND portability": [
        {
            **ZSRE,
            "pred": "a guess",
            "answers": ["Ulmarket"],
            "cond": "Ulmarket >> Pellsund",
            "portability": {"Recalled Relation": "(a, b, c)", "New Question": "In which land?", "New Answer": "Vell"},
        },
        {**ZSRE, "src": "", "answers": [], "portability": {}},
    ],
    "WikiFactDiff": [
        {"en": {**{k: v for k, v in ZSRE.items() if k != "pred"}, "old": "Ulmarket", "loc": "", "loc_ans": ""}},
        {"en": {**ZSRE, "alt": ""}},
    ],
    "ConvSent": [
        {
            "ent": "salted plums",
            "pos": [
                " I like them. ",
                " I  adore salted plums, always have. ",
                "Yes!",
                "They taste of home and summer.",
            ],
            "neg": ["No.", "They are too sour.", " I would rather eat my hat, honestly. ", "Salt and plums? Never."],
        },
        {"ent": "kites", "pos": ["Good!"], "neg": ["Bad!"]},
        {"ent": "fog", "pos": ["It is lovely."], "neg": ["It is wet."]},
    ],
    "personality": [
        {
            "ent": "salted plums",
            "extraversion": ["Plums at a party, yes please!"],
            "agreeableness": ["Everybody should get some plums."],
            "neuroticism": ["What if I choke on a plum?"],
        },
        {"ent": " ", "extraversion": [], "agreeableness": [], "neuroticism": []},
        {"ent": "fog", "extraversion": [], "agreeableness": [], "neuroticism": ["Fog makes me nervous."]},
    ],
    "own": [
        {**FACT, "target": " Tovi Arrend ", "rephrases": ["Ulmarket is governed by"]},
        {**FACT, "target": ""},
    ],
}


@pytest.fixture
def write(tmp_path: Path):
    """Writes records as a JSON list, or as JSONL where the name says so."""

    def write_records(records: Any, name: str = "source.json") -> Path:
        path = tmp_path / name
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        else:
            path.write_text(json.dumps(records), encoding="utf-8")
        return path

    return write_records


def facts(n: int, start: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Own records about n subjects."""
    return [
        {"subject": f"Town {i}", "prompt": f"The river of Town {i} is the", "target": f"Stream {i % 7}", **more}
        for i in range(start, start + n)
    ]


@pytest.fixture
def make_facts():
    return facts


@pytest.fixture
def excerpts():
    return EXCERPTS
