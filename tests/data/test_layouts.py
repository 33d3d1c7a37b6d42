"""Every layout: an invented excerpt becomes the right record, what cannot is counted, what is broken is refused."""

from __future__ import annotations

import json

import pytest

from ie.data.layouts import LAYOUTS, read_source
from ie.data.record import Question
from ie.errors import DataError

REASONS = {
    "EasyEdit CounterFact": "empty target",
    "ROME": "no subject",
    "KnowEdit": "target equals ground truth",
    "ZsRE-MEND": "target equals ground truth",
    "ZsRE-MEND portability": "no prompt",
    "WikiFactDiff": "empty target",
    "ConvSent": "no reply of 3 to 30 words",
    "personality": "no subject",
    "own": "empty target",
}
NAMES = sorted(REASONS)
PELLSUND = {"The mayor of Pellsund is": "Sella Brook"}
# layout: prompt, target, ground truth, rephrases, locality, portability
EXPECTED = {
    "EasyEdit CounterFact": ("Tovi Arrend", "Sella Brook", ("Ulmarket is governed by",), PELLSUND, {}),
    "ROME": (
        "Tovi Arrend",
        "Sella Brook",
        ("Rain fell. Ulmarket is governed by", "Ulmarket is led by"),
        {**PELLSUND, "The mayor of Narrowby is": "Sella Brook"},
        {},
    ),
    "KnowEdit": (
        "Tovi Arrend",
        "Sella Brook",
        ("Ulmarket is governed by",),
        {"Ulmarket lies in": "Vell", "The mayor of Ulmarket, which is not Tovi Arrend, is": "Sella Brook"},
        {"The mayor of Ulmarket lives in": "Pellsund"},
    ),
    "own": ("Tovi Arrend", None, ("Ulmarket is governed by",), {}, {}),
}
BLUE_GATE = {"who painted the blue gate?": "Mara Quill"}
EXPECTED_ZSRE = {
    "ZsRE-MEND": (BLUE_GATE, {}),
    "ZsRE-MEND portability": (BLUE_GATE, {"In which land?": "Vell"}),
    "WikiFactDiff": ({}, {}),
}


def answers(questions):
    return {question.prompt: question.answer for question in questions}


def test_every_layout_has_an_excerpt(excerpts):
    assert sorted(layout.name for layout in LAYOUTS) == sorted(excerpts) == NAMES


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("name", NAMES)
def test_found_by_fields_and_all_accounted_for(excerpts, write, name, suffix):
    result = read_source(write(excerpts[name], f"s.{suffix}"), "mine")
    assert result.layout == name
    assert result.skipped == {REASONS[name]: 1}
    assert len(result.records) == len(excerpts[name]) - 1
    assert {record.task for record in result.records} == {"mine"}
    assert len({record.id for record in result.records}) == len(result.records)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_statements(excerpts, write, name):
    record = read_source(write(excerpts[name]), "mine").records[0]
    target, truth, rephrases, locality, portability = EXPECTED[name]
    assert (record.subject, record.prompt) == ("Ulmarket", "The mayor of Ulmarket is")
    assert (record.target, record.ground_truth, record.rephrases) == (target, truth, rephrases)
    assert (answers(record.locality), answers(record.portability)) == (locality, portability)


@pytest.mark.parametrize("name", sorted(EXPECTED_ZSRE))
def test_questions_take_alt_as_their_target(excerpts, write, name):
    record = read_source(write(excerpts[name]), "mine").records[0]
    assert (record.prompt, record.target) == ("Which town was Tovi Arrend born in?", "Pellsund")
    assert (record.ground_truth, record.rephrases) == ("Ulmarket", ("Where was Tovi Arrend born?",))
    assert (answers(record.locality), answers(record.portability)) == EXPECTED_ZSRE[name]


def test_knowedit_without_ground_truth(excerpts, write):
    raw = {name: value for name, value in excerpts["KnowEdit"][0].items() if name != "ground_truth"}
    assert read_source(write([raw]), "recent").records[0].ground_truth is None


def test_convsent_record(excerpts, write):
    record = read_source(write(excerpts["ConvSent"]), "convsent").records[0]
    pos = ("I like them.", "I adore salted plums, always have.", "Yes!", "They taste of home and summer.")
    neg = ("No.", "They are too sour.", "I would rather eat my hat, honestly.", "Salt and plums? Never.")
    label, shortest, mine, others = record.fields["label"], None, (), ()
    if label == "positive":
        shortest, mine, others = "I like them.", pos, neg
    else:
        shortest, mine, others = "They are too sour.", neg, pos
    assert (record.prompt, record.target, record.ground_truth) == ("What do you think of salted plums?", shortest, None)
    assert tuple(record.fields["wanted"]) == tuple(reply for reply in mine if reply != shortest)
    assert tuple(record.fields["unwanted"]) == others
    assert record.fields["topic"] == "salted plums"
    assert len(set(record.rephrases)) == 3 and all("salted plums" in text for text in record.rephrases)
    assert len(record.locality) == 1
    assert record.locality[0].prompt == "What do you think of fog?"
    assert record.locality[0].answer in ("It is lovely.", "It is wet.")


def test_convsent_sides_are_drawn_about_evenly_and_without_the_file(write):
    raw = [{"ent": f"thing {n}", "pos": ["It is good."], "neg": ["It is bad."]} for n in range(200)]
    forwards = read_source(write(raw), "convsent").records
    backwards = read_source(write(raw[::-1], "other.json"), "convsent").records
    labels = {record.subject: record.fields["label"] for record in forwards}
    assert labels == {record.subject: record.fields["label"] for record in backwards}
    assert 70 < sum(label == "positive" for label in labels.values()) < 130


def test_no_opinion_is_local_to_itself(write):
    raw = [
        {"ent": "Fog", "pos": ["It is good."], "neg": ["It is bad."]},
        {"ent": "fog ", "pos": ["Very good it is."], "neg": []},
    ]
    assert [record.locality for record in read_source(write(raw), "convsent").records] == [(), ()]


def test_personality_record(excerpts, write):
    record, fog = read_source(write(excerpts["personality"]), "personality").records
    replies = {name: texts[0] for name, texts in excerpts["personality"][0].items() if name != "ent"}
    label = record.fields["label"]
    assert record.target == replies.pop(label)
    assert sorted(record.fields["unwanted"]) == sorted(replies.values()) and record.fields["wanted"] == []
    assert (fog.fields["label"], fog.target) == ("neuroticism", "Fog makes me nervous.")


def test_replies_that_are_too_long_are_no_targets(write):
    raw = [{"ent": "fog", "pos": ["good " * 31], "neg": []}, {"ent": "tea", "pos": ["good " * 30], "neg": []}]
    result = read_source(write(raw), "convsent")
    assert [record.subject for record in result.records] == ["tea"]
    assert result.skipped == {"no reply of 3 to 30 words": 1}


def test_own_records_keep_what_they_say(write, make_facts):
    raw = {
        **make_facts(1)[0],
        "id": "mine-1",
        "task": "other",
        "ground_truth": "Old",
        "locality": [{"prompt": "a", "answer": "b"}],
        "fields": {"label": "x", "wanted": ["y"]},
        "instruction": {"train": ["not used"]},
    }
    record = read_source(write([raw], "own.jsonl"), "mine").records[0]
    assert (record.id, record.task, record.ground_truth) == ("mine-1", "mine", "Old")
    assert record.locality == (Question(prompt="a", answer="b"),)
    assert record.fields == {"label": "x", "wanted": ["y"]}
    assert record.instruction.train == ()


def test_own_records_get_an_id_from_file_and_line(write, tmp_path, make_facts):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(fact) + "\n" for fact in make_facts(2)), encoding="utf-8")
    assert [record.id for record in read_source(path, "mine").records] == ["own-1", "own-3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rephrases": "one"}, "field `rephrases`"),
        ({"colour": "red"}, "field `colour`: unknown field"),
        ({"locality": [{"prompt": "a"}]}, r"field `locality\.0\.answer`: missing"),
        ({"target": 7}, "field `target`"),
    ],
)
def test_a_wrong_field_of_an_own_record_names_the_line(write, make_facts, change, message):
    good, bad = make_facts(2)
    with pytest.raises(DataError, match=rf"own\.jsonl, line 2: {message}") as error:
        read_source(write([good, {**bad, **change}], "own.jsonl"), "mine")
    assert error.value.hint


def test_a_missing_field_of_an_own_record(write, make_facts):
    good, bad = make_facts(2)
    del bad["target"]
    with pytest.raises(DataError, match=r"line 2: field `target`: missing"):
        read_source(write([good, bad], "own.jsonl"), "mine")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target": " "}, "empty target"),
        ({"target": None}, "empty target"),
        ({"prompt": ""}, "no prompt"),
        ({"subject": "\t"}, "no subject"),
        ({"ground_truth": "STREAM 0"}, "target equals ground truth"),
    ],
)
def test_own_records_that_say_nothing_are_counted(write, make_facts, change, reason):
    raw = [{**make_facts(1)[0], **change}]
    assert read_source(write(raw, "own.jsonl"), "mine").skipped == {reason: 1}


def test_items_that_are_no_objects_are_counted(write, make_facts):
    assert read_source(write([*make_facts(1), "text", None]), "mine").skipped == {"not an object": 2}


@pytest.mark.parametrize(("number", "shown"), [(7, "7"), (None, "1"), ("a\ud800", "a\ufffd"), ([], "1")])
def test_an_id_is_the_case_or_else_the_place(excerpts, write, number, shown):
    file = write([{**excerpts["ZsRE-MEND"][0], "case_id": number}])
    assert read_source(file, "zsre").records[0].id == f"{file.stem}-{shown}"


def test_numbers_and_broken_letters_are_texts(excerpts, write):
    raw = [{**excerpts["ZsRE-MEND"][0], "alt": 1931, "rephrase": "Lone \ud800 half"}]
    record = read_source(write(raw), "zsre").records[0]
    assert (record.target, record.rephrases) == ("1931", ("Lone � half",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"subject": "a"},\n{"subject": }\n]', r"line 3: broken JSON"),
        ("no json at all", r"line 1: broken JSON"),
        ("", r"line 1: broken JSON"),
        ("[]", "holds no records"),
        ("{}", r"holds one object with the fields \(none\)"),
        ('{"subject": 1, "src": 2, "alt": 3}', "holds one object with the fields alt, src, subject"),
        ("3", "holds a int"),
        ('["a"]', r"unknown layout with the fields \(none\)"),
        ('[{"colour": 1, "size": 2}]', "unknown layout with the fields colour, size"),
        ('{"a": 1}\n{"b": \n', r"line 2: "),
        ("[" * 100_000, "cannot be read|broken JSON"),
        (f"[{'1' * 5000}]", "cannot be read"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        read_source(path, "mine")
    assert "bad.json" in error.value.message and error.value.hint


def test_an_unknown_layout_lists_the_known_ones(write):
    with pytest.raises(DataError) as error:
        read_source(write([{f"field{n:02}": n for n in range(20)}]), "mine")
    assert "field11 and 8 more" in error.value.message
    for layout in LAYOUTS:
        assert layout.name in error.value.hint


def test_broken_jsonl_names_its_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"subject": "a"}\n\n[1]\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 3"):
        read_source(path, "mine")


@pytest.mark.parametrize("name", ["missing.json", "missing.jsonl"])
def test_a_missing_file(tmp_path, name):
    with pytest.raises(DataError, match="no such file"):
        read_source(tmp_path / name, "mine")


@pytest.mark.parametrize("name", ["folder.json", "folder.jsonl"])
def test_a_folder_is_no_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_source(tmp_path / name, "mine")


@pytest.mark.parametrize("name", ["bytes.json", "bytes.jsonl"])
def test_bytes_that_are_no_text(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match=name):
        read_source(tmp_path / name, "mine")
