"""Instruction templates: what an editor is told about the kind of change that a record asks for.

One YAML file a task. Its instructions are Jinja texts that may name a record's `subject`, its `task` and its text
fields (`label`, `topic`, ...), never what the edit is to write: an instruction names the kind of change and must not
give the answer away. A placeholder that is not filled is an error, never an empty string.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import jinja2.meta
import jinja2.nodes
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ie.data.record import Record, Stripped
from ie.errors import TemplateError

__all__ = [
    "HeldoutInstruction",
    "Template",
    "fingerprint",
    "instructed",
    "load_templates",
    "read_templates",
    "templates_text",
]

DEFAULT_LAYOUT = "Task: {{ name }}\nDescription: {{ instruction }}"
MIN_TRAIN, MIN_HELDOUT = 10, 5
FOLDER_HINT = "--templates takes a folder of TASK.yaml files"
# Never filled in: these hold the answer, or so much of it that an editor could copy instead of learn.
REVEALING = frozenset(
    {"answer", "ground_truth", "locality", "portability", "prompt", "rephrases", "target", "unwanted", "wanted"}
)
_MARK = "\0"  # stands for an instruction where its layout is looked at
LAYOUT_NAMES = frozenset({"about", "instruction", "name"})
# What an expression inside a template may raise when it is evaluated, beside Jinja's own errors.
RENDER_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class HeldoutInstruction(BaseModel):
    """An instruction that no editor is trained on, with the name of the style it is written in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    style: Name
    text: Stripped


class Template(BaseModel):
    """The instructions of one task, as `templates/TASK.yaml` holds them.

    `scope` says how far an edit of the task reaches: a `fact` is to hold in any wording, a `wording` is to change and
    every other wording of the same fact to stay as it was.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Name
    name: Stripped
    about: Stripped
    layout: Stripped = DEFAULT_LAYOUT
    scope: Literal["fact", "wording"] = "fact"
    train: tuple[Stripped, ...] = Field(min_length=MIN_TRAIN)
    heldout: tuple[HeldoutInstruction, ...] = Field(min_length=MIN_HELDOUT)

    @property
    def styles(self) -> tuple[str, ...]:
        """The styles of the held-out instructions, in the order of `render(record, "heldout")`."""
        return tuple(instruction.style for instruction in self.heldout)

    def laid_out(self, instruction: str) -> str:
        """An instruction of a user's own in the layout of this task's, which is how an editor knows the task best.

        One that is laid out already, known by what the layout puts before it, stays as it is.

        Raises:
            TemplateError: the layout asks for what a record alone has.
        """
        try:
            before, _, behind = _lay_out(self, _MARK, {}).partition(_MARK)
            bare = instruction.strip()
            if before and bare.startswith(before) and bare.endswith(behind):
                bare = bare.removeprefix(before).removesuffix(behind)
            return _lay_out(self, bare, {})
        except RENDER_ERRORS as error:
            raise TemplateError(f"{self.task}.yaml, field `layout`: {error} (of no record)") from error

    def texts(self, group: Literal["train", "heldout"]) -> tuple[str, ...]:
        """The unfilled instructions of one group."""
        return self.train if group == "train" else tuple(instruction.text for instruction in self.heldout)

    def render(self, record: Record, group: Literal["train", "heldout"]) -> tuple[str, ...]:
        """Fills a group of instructions with what a record holds.

        Args:
            record: its subject, task and text fields are what placeholders may name.
            group: `train` or `heldout`.

        Returns:
            One text per instruction, laid out, without a newline at its end.

        Raises:
            TemplateError: a placeholder that this record cannot fill, or an expression that fails.
        """
        offered = _offered(record)
        filled = []
        for n, text in enumerate(self.texts(group), start=1):
            needed = _placeholders(text) | _placeholders(self.layout)
            values = tuple((name, offered[name]) for name in sorted(needed & offered.keys()))
            try:
                filled.append(_fill(self, text, values))
            except RENDER_ERRORS as error:
                where = f"{self.task}.yaml, {_field(self.layout, needed - offered.keys(), group, n)}"
                raise TemplateError(
                    f"{where}: {error} (record {record.id!r})",
                    hint=f"this record offers {', '.join(sorted(offered))}; add the field to the record's `fields`, "
                    "or take the placeholder out of the template",
                ) from error
        return tuple(filled)


def _offered(record: Record) -> dict[str, str]:
    """What an instruction may name of a record."""
    texts = {name: value for name, value in record.fields.items() if isinstance(value, str) and name not in REVEALING}
    return {**texts, "subject": record.subject, "task": record.task}


def _field(layout: str, missing: set[str] | frozenset[str], group: str, n: int) -> str:
    """The template's field that an error belongs to."""
    if (_placeholders(layout) - LAYOUT_NAMES) & missing:
        return "field `layout`"
    return f"field `{group}`, instruction {n}"


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)


@lru_cache(maxsize=1024)
def _placeholders(text: str) -> frozenset[str]:
    return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(text)))


@lru_cache(maxsize=1024)
def _compiled(text: str) -> jinja2.Template:
    return _environment().from_string(text)


@lru_cache(maxsize=8192)
def _fill(template: Template, text: str, values: tuple[tuple[str, str], ...]) -> str:
    """One instruction, filled and laid out; kept, because most instructions are the same for many records."""
    given = dict(values)
    return _lay_out(template, _compiled(text).render(given), given)


def _lay_out(template: Template, instruction: str, given: Mapping[str, str]) -> str:
    values = {"name": template.name, "about": template.about, "instruction": " ".join(instruction.split())}
    return _compiled(template.layout).render({**given, **values}).strip()


def instructed(instruction: str, prompt: str) -> str:
    """The prompt as an editor reads it under an instruction."""
    return f"{instruction}\nInput: {prompt}"


def fingerprint(templates: Mapping[str, Template]) -> str:
    """A short hash of all that the templates say, whatever order or file they come from."""
    return hashlib.sha256(templates_text(templates).encode("utf-8")).hexdigest()[:16]


def templates_text(templates: Mapping[str, Template]) -> str:
    """All that the templates say, as JSON."""
    content = {task: template.model_dump(mode="json") for task, template in templates.items()}
    return json.dumps(content, sort_keys=True, ensure_ascii=False)


def read_templates(file: Path) -> dict[str, Template]:
    """Templates from the JSON of `templates_text`.

    Raises:
        TemplateError: if the file cannot be read, or holds anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {task: Template.model_validate(one) for task, one in content.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise TemplateError(f"{file} holds no templates: {reason}", hint="build the dataset again") from error


def load_templates(directory: str | Path | None = None) -> dict[str, Template]:
    """Reads and checks every template of a folder.

    Args:
        directory: a folder of TASK.yaml files; None for the ones that come with `ie`.

    Returns:
        The templates by task, sorted.

    Raises:
        TemplateError: no folder, no template in it, or one that is not valid; the message names file and field.
    """
    folder: Traversable = _bundled() if directory is None else Path(directory)
    if not folder.is_dir():
        raise TemplateError(f"no folder of templates: {directory}", hint=FOLDER_HINT)
    templates: dict[str, Template] = {}
    for file in sorted(_yaml_files(folder), key=lambda found: found.name):
        template = _load(file)
        if template.task in templates:
            raise TemplateError(f"{file.name}: two templates for the task {template.task!r}", hint="keep one of them")
        templates[template.task] = template
    if not templates:
        raise TemplateError(f"no template in {directory}", hint=FOLDER_HINT)
    return templates


def _bundled() -> Traversable:
    """The installed templates, or the source tree's own when `ie` runs from there without being installed."""
    try:
        return importlib.resources.files("ie.templates")
    except ModuleNotFoundError:
        return Path(__file__).resolve().parents[2] / "templates"


def _yaml_files(folder: Traversable) -> Iterator[Traversable]:
    return (file for file in folder.iterdir() if file.name.endswith((".yaml", ".yml")) and file.is_file())


def _load(file: Traversable) -> Template:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise TemplateError(
            f"{file.name}{line}: not valid YAML: {error.problem or error}",
            hint="put texts that hold a colon or begin with {{ in quotes",
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # a date that is none is a plain ValueError
        raise TemplateError(f"{file.name}: cannot be read: {error}", hint="a template is YAML in UTF-8") from error
    if not isinstance(content, dict):
        raise TemplateError(
            f"{file.name}: expected keys and values, got {type(content).__name__}",
            hint="a template has the keys task, name, about, train, heldout and, if wanted, layout",
        )
    try:
        template = Template.model_validate(content)
    except ValidationError as error:
        raise TemplateError(
            f"{file.name}: " + "; ".join(_explain(problem) for problem in error.errors()),
            hint=f"a template has task, name, about, at least {MIN_TRAIN} train instructions and at least "
            f"{MIN_HELDOUT} heldout ones, each with style and text; layout is optional",
        ) from error
    _check(template, file.name)
    return template


def _explain(problem: Any) -> str:
    """A pydantic problem as `field: what is wrong`, list positions counted from 1 as in the error texts elsewhere."""
    path = " ".join(str(part + 1) if isinstance(part, int) else str(part) for part in problem["loc"])
    if problem["type"] == "too_short":
        context = problem["ctx"]
        return f"{path}: {context['actual_length']} instructions, at least {context['min_length']} are needed"
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown key"
    return f"{path}: {problem['msg']}"


def _check(template: Template, file: str) -> None:
    """What a template's own text can show to be wrong, before any record is there."""
    stem = file.rsplit(".", 1)[0]
    if template.task != stem:
        raise TemplateError(f"{file}: its task is {template.task!r}", hint=f"name the file {template.task}.yaml")
    _check_placeholders(template.layout, file, "field `layout`")
    if "instruction" not in _placeholders(template.layout):
        raise TemplateError(f"{file}, field `layout`: {{{{ instruction }}}} is missing", hint=f"try {DEFAULT_LAYOUT!r}")
    seen: Counter[str] = Counter()
    for group in ("train", "heldout"):
        for n, text in enumerate(template.texts(group), start=1):
            where = f"field `{group}`, instruction {n}"
            _check_placeholders(text, file, where)
            key = " ".join(text.casefold().split())
            seen[key] += 1
            if seen[key] > 1:
                raise TemplateError(
                    f"{file}, {where}: said twice: {text!r}",
                    hint="training and held-out instructions must all differ, or the hold-out measures nothing",
                )
            wrong = _placeholders(text) & LAYOUT_NAMES
            if wrong:
                raise TemplateError(
                    f"{file}, {where}: placeholder {', '.join(sorted(wrong))} belongs to the layout",
                    hint="an instruction may name subject, task and the record's text fields",
                )


def _check_placeholders(text: str, file: str, where: str) -> None:
    try:
        names = _placeholders(text)
        _compiled(text)
    except jinja2.TemplateError as error:
        raise TemplateError(f"{file}, {where}: no Jinja text: {error}", hint=f"the text is {text!r}") from error
    revealing = names & REVEALING
    if revealing:
        raise TemplateError(
            f"{file}, {where}: placeholder {', '.join(sorted(revealing))} would give the answer away",
            hint="an instruction may name subject, task and the record's text fields such as label and topic",
        )
