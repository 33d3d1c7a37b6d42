"""Templates: what comes with ie is whole and gives nothing away; what is wrong is refused by file and field."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ie.data.record import Record
from ie.data.templates import fingerprint, instructed, load_templates
from ie.errors import TemplateError

TASKS = (
    "convsent",
    "counterfact",
    "every-wording",
    "general",
    "one-wording",
    "people",
    "personality",
    "places",
    "recent",
    "wikifactdiff",
    "zsre",
)
STYLES = {"terse-order", "polite-request", "dataset-description", "user-complaint", "foreign-word-order"}
FIELDS = {"label": "positive", "topic": "tea", "wanted": ["Tea is fine."]}


def record(**fields: object) -> Record:
    return Record(id="r1", task="demo", subject="Ulmarket", prompt="p", target="SECRET", fields=fields)


def template(**changes: object) -> dict[str, object]:
    return {
        "task": "demo",
        "name": "Demo",
        "about": "a demonstration",
        "train": [f"Change number {n}." for n in range(10)],
        "heldout": [{"style": f"style-{n}", "text": f"Hold out {n}."} for n in range(5)],
        **changes,
    }


@pytest.fixture
def load(tmp_path: Path):
    def load_one(content: object, name: str = "demo.yaml"):
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return load_templates(tmp_path)

    return load_one


def test_bundled_templates_are_complete():
    templates = load_templates()
    assert tuple(templates) == TASKS
    for task, found in templates.items():
        assert found.task == task
        assert len(found.train) == 24
        assert set(found.styles) >= STYLES
        assert len(found.styles) == len(found.render(record(**FIELDS), "heldout"))


def test_an_instruction_of_a_users_own_gets_the_tasks_layout(load):
    found = load_templates()["people"]
    assert found.laid_out("  Do\n this. ") == "Task: People\nDescription: Do this."
    assert found.laid_out("Do this.") == found.model_copy(update={"train": ("Do this.",)}).render(record(), "train")[0]
    assert found.laid_out(f"{found.laid_out('Do this.')}\n") == found.laid_out("Do this.")
    marked = load(template(layout="<{{ name }}> {{ instruction }} <end>"))["demo"]
    assert marked.laid_out(marked.laid_out("Do this.")) == marked.laid_out("Do this.")
    dotted = load(template(layout="{{ instruction }}."))["demo"]
    assert dotted.laid_out("Do this.") == "Do this.."  # nothing stands before it by which it could be known
    of_records = load(template(layout="{{ subject }}: {{ instruction }}"))["demo"]
    with pytest.raises(TemplateError, match=r"demo\.yaml, field `layout`"):
        of_records.laid_out("Do this.")


def test_bundled_instructions_differ_over_all_tasks():
    texts = [
        text for found in load_templates().values() for group in ("train", "heldout") for text in found.texts(group)
    ]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("task", TASKS)
def test_rendered_instructions_are_filled_and_reveal_nothing(task):
    found = load_templates()[task]
    for group in ("train", "heldout"):
        for text in found.render(record(**FIELDS), group):
            assert text.startswith(f"Task: {found.name}\nDescription: ")
            assert text.count("\n") == 1 and text == text.strip()
            assert "{" not in text and "SECRET" not in text and "Tea is fine." not in text


def test_label_and_topic_reach_the_instructions():
    for task in ("convsent", "personality"):
        for text in load_templates()[task].render(record(**FIELDS), "heldout"):
            assert "positive" in text and "tea" in text


def test_values_are_not_templates_themselves():
    texts = load_templates()["convsent"].render(record(label="{{ 7 * 7 }}", topic="{% if %}"), "train")
    assert all("{{ 7 * 7 }}" in text for text in texts)


def test_instructed():
    assert instructed("Task: A\nDescription: b", "The mayor is") == "Task: A\nDescription: b\nInput: The mayor is"


def test_fingerprint_follows_the_content(load):
    first = load(template())
    again = load(template())
    changed = load(template(about="another"))
    assert fingerprint(first) == fingerprint(again) != fingerprint(changed)
    assert len(fingerprint(first)) == 16


def test_default_and_own_layout(load):
    assert load(template())["demo"].render(record(), "train")[0] == "Task: Demo\nDescription: Change number 0."
    own = load(template(layout="[{{ task }}] {{ about }}: {{ instruction }}"))
    assert own["demo"].render(record(), "train")[0] == "[demo] a demonstration: Change number 0."


@pytest.mark.parametrize("group", ["train", "heldout"])
def test_undefined_placeholder_names_file_field_and_record(load, group):
    texts = template()[group]
    texts[2] = "About {{ mood }}." if group == "train" else {"style": "x", "text": "About {{ mood }}."}
    templates = load(template(**{group: texts}))
    assert templates["demo"].render(record(mood="calm"), group)[2].endswith("About calm.")
    with pytest.raises(
        TemplateError, match=rf"demo\.yaml, field `{group}`, instruction 3: 'mood' is undefined .*'r1'"
    ) as e:
        templates["demo"].render(record(), group)
    assert "subject, task" in e.value.hint


def test_undefined_placeholder_in_the_layout(load):
    templates = load(template(layout="{{ mood }} {{ instruction }}"))
    with pytest.raises(TemplateError, match=r"demo\.yaml, field `layout`: 'mood' is undefined"):
        templates["demo"].render(record(), "train")


@pytest.mark.parametrize("text", ["{{ subject.__class__.__mro__ }}", "{{ 1 / 0 }}", "{{ subject + 1 }}", "{{ ().x }}"])
def test_expressions_that_fail_or_reach_out_are_template_errors(load, text):
    templates = load(template(train=[text, *(f"Text {n}" for n in range(9))]))
    with pytest.raises(TemplateError, match=r"demo\.yaml, field `train`, instruction 1"):
        templates["demo"].render(record(), "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ["one"]}, "train: 1 instructions, at least 10 are needed"),
        ({"heldout": [{"style": "a", "text": "b"}]}, "heldout: 1 instructions, at least 5 are needed"),
        ({"extra": 1}, "extra: unknown key"),
        ({"name": " "}, "name: "),
        ({"heldout": [f"text {n}" for n in range(5)]}, "heldout 1: "),
        ({"train": [f"Hold out {n}." for n in range(10)]}, "field `heldout`, instruction 1: said twice"),
        ({"train": ["Same."] * 10}, "field `train`, instruction 2: said twice"),
        ({"train": ["{{ target }}", *"abcdefghi"]}, "field `train`, instruction 1: placeholder target would give"),
        ({"train": ["{{ wanted[0] }}", *"abcdefghi"]}, "placeholder wanted would give"),
        ({"train": ["{{ about }}", *"abcdefghi"]}, "placeholder about belongs to the layout"),
        ({"train": ["{{ open", *"abcdefghi"]}, "field `train`, instruction 1: no Jinja text"),
        ({"train": ["{{ subject | nosuch }}", *"abcdefghi"]}, "no Jinja text"),
        ({"layout": "{{ name }}"}, "field `layout`: {{ instruction }} is missing"),
        ({"task": "other"}, "its task is 'other'"),
    ],
)
def test_a_wrong_template_is_refused(load, changes, message):
    with pytest.raises(TemplateError) as error:
        load(template(**changes))
    assert "demo.yaml" in error.value.message and message in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: demo\nname: [open\n", "demo.yaml, line 3: not valid YAML"),
        ("just text", "expected keys"),
        ("name: 2024-13-45", "demo.yaml: cannot be read"),
        ("", "expected keys"),
    ],
)
def test_a_file_that_is_no_template(load, text, message):
    with pytest.raises(TemplateError, match=message):
        load(text)


def test_all_that_is_wrong_is_said_at_once(load):
    with pytest.raises(TemplateError) as error:
        load({"task": "demo", "train": []})
    for field in ("name", "about", "train", "heldout"):
        assert f"{field}: " in error.value.message


def test_no_folder_and_an_empty_one(tmp_path):
    with pytest.raises(TemplateError, match="no folder"):
        load_templates(tmp_path / "missing")
    with pytest.raises(TemplateError, match="no template in"):
        load_templates(tmp_path)
