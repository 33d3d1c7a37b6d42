"""`ie edit`: one edit, one patch file; or many from a file."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ie.errors import DataError, EditFailedError, InputError

from .files import check_model, check_new, check_new_file, read_editor_info
from .options import DEFAULT_EDITOR, DEFAULT_PATCH, BaseOf, Debug, Device, Dtype, Force, Json, Quant, Quiet, Templates
from .render import Render, reporting

if TYPE_CHECKING:
    from ie.data.templates import Template

__all__ = ["check_took", "edit", "read_requests"]

DEFAULT_FOLDER = Path("patches")


def edit(
    instruction: Annotated[
        str | None, typer.Option("--instruction", "-i", metavar="I", help="What kind of edit this is (or --task).")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="P", help="Text that the model continues.")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", metavar="T", help="The new continuation.")] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="T", help="Lays the instruction out as in training; alone, the task's own."),
    ] = None,
    templates: Templates = None,
    editor: Annotated[Path, typer.Option("--editor", metavar="DIR", help="Editor folder.")] = DEFAULT_EDITOR,
    model: BaseOf = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="F",
            help="Patch file; with --from alone a folder.",
            show_default=f"{DEFAULT_PATCH}, or {DEFAULT_FOLDER}/",
        ),
    ] = None,
    probe: Annotated[
        list[str] | None, typer.Option("--probe", metavar="TEXT", help="Prompt that should not move; repeatable.")
    ] = None,
    from_file: Annotated[
        Path | None,
        typer.Option("--from", metavar="F.jsonl", help="A line an edit: prompt, target, instruction, task, probes."),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="With --from: one patch for all edits, by least squares.")
    ] = False,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="With --from: a stack, each edit on the model edited so far.")
    ] = False,
    regularisation: Annotated[
        float | None,
        typer.Option(
            "--regularisation",
            metavar="X",
            help="Of --joint: more keeps more alone.",
            show_default="the editor's, or 0.1",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="N", min=1, help="Largest rank of the patch.", show_default="99.9 % of energy"),
    ] = None,
    patch_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option("--patch-dtype", metavar="D", help="float32, bfloat16, float16; auto: the last if precise."),
    ] = "auto",
    quant: Quant = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make one edit and write it as a patch file."""
    with reporting(json=json, quiet=quiet, debug=debug) as render:
        if model is not None:
            check_model(model)
        needs_instruction = read_editor_info(editor).get("method") != "mend"
        probes = tuple(probe or ())
        if from_file is None:
            told = _told(instruction, task, templates, "--task")
            requests = [_one(told, prompt, target, probes, needs_instruction=needs_instruction)]
        elif prompt is not None or target is not None:
            raise InputError("--from cannot be used with --prompt or --target", hint="give one or the other")
        else:
            requests = read_requests(
                from_file, instruction, probes, task=task, templates=templates, needs_instruction=needs_instruction
            )
        together = _together(from_file, joint=joint, sequential=sequential, regularisation=regularisation)
        if templates is not None and task is None and from_file is None:
            raise InputError("--templates needs --task", hint="a template is found by its task")
        is_file = from_file is None or together is not None
        out = out or (DEFAULT_PATCH if is_file else DEFAULT_FOLDER)
        (check_new_file if is_file else check_new)(out, force=force)

        from ie.editor.editing import EditSettings
        from ie.editor.editing import edit as make_edit

        from .tables import edit_view

        settings = EditSettings.model_validate(
            {
                "requests": requests, "many": from_file is not None, "editor": editor, "model": model, "out": out,
                "rank": rank, "patch_dtype": patch_dtype, "quant": quant, "dtype": dtype, "device": device,
                "together": together,
                **({} if regularisation is None else {"regularisation": regularisation}),
            }
        )  # fmt: skip
        result = make_edit(settings)
        render.result(result, *edit_view(result))
        check_took(result)
        _suggest_weaker(result, render)


def _together(
    from_file: Path | None, *, joint: bool, sequential: bool, regularisation: float | None
) -> Literal["joint", "sequential"] | None:
    """How edits of a file share one patch, if they do."""
    if joint and sequential:
        raise InputError("--joint cannot be used with --sequential", hint="give one or the other")
    if (joint or sequential) and from_file is None:
        raise InputError(
            f"{'--joint' if joint else '--sequential'} needs --from", hint="`ie edit --help` shows an example"
        )
    if regularisation is not None and not joint:
        raise InputError("--regularisation needs --joint", hint="only least squares over many edits has one")
    if regularisation is not None and not 0 < regularisation < float("inf"):
        raise InputError(f"--regularisation {regularisation}: expected a positive number")
    return "joint" if joint else "sequential" if sequential else None


def _told(instruction: str | None, task: str | None, templates: Path | None, where: str) -> str | None:
    """What the editor is told: the instruction, laid out as training had it where the task is named.

    Raises:
        InputError: there is no such task.
    """
    if task is None or (instruction is not None and not instruction.strip()):
        return instruction
    known = _templates(templates)
    if task not in known:
        raise InputError(f"{where}: no template of task {task!r}", hint=f"there are {', '.join(known)}")
    return known[task].laid_out(known[task].about if instruction is None else instruction)


@cache
def _templates(folder: Path | None) -> dict[str, Template]:
    from ie.data.templates import load_templates

    return load_templates(folder)


def read_requests(
    file: Path,
    instruction: str | None,
    probes: tuple[str, ...],
    *,
    task: str | None = None,
    templates: Path | None = None,
    needs_instruction: bool,
) -> list[dict[str, Any]]:
    """Read `--from`: one JSON object a line, with prompt and target, and instruction, task and probes of its own.

    Raises:
        DataError: the file cannot be read, or a line is not as expected; the message names the line.
    """
    import jsonlines

    requests: list[dict[str, Any]] = []
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(jsonlines.Reader(lines).iter(type=dict, skip_empty=True), 1):
                where = f"{file}, edit {number}"
                unknown = sorted(set(line) - {"instruction", "task", "prompt", "target", "probes"})
                if unknown:
                    raise DataError(f"{where}: unknown fields: {', '.join(unknown)}", hint=_FROM_HINT)
                own = line.get("probes", [])
                if not isinstance(own, list) or not all(isinstance(text, str) and text.strip() for text in own):
                    raise DataError(f"{where}: probes must be a list of texts", hint=_FROM_HINT)
                named = {name: _text(line[name], name, where) for name in ("instruction", "task") if name in line}
                told = _told(named.get("instruction", instruction), named.get("task", task), templates, where)
                requests.append(
                    {
                        "instruction": _text(told, "instruction", where) if needs_instruction else told,
                        "prompt": _text(line.get("prompt"), "prompt", where),
                        "target": _text(line.get("target"), "target", where),
                        "probes": (*probes, *own),
                    }
                )
    except jsonlines.InvalidLineError as error:
        raise DataError(f"{file}, line {error.lineno}: broken JSON", hint=_FROM_HINT) from error
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason})") from error
    if not requests:
        raise DataError(f"{file} holds no edits", hint=_FROM_HINT)
    return requests


_FROM_HINT = 'each line is an object such as {"instruction": "...", "prompt": "...", "target": "..."}'


def _one(
    instruction: str | None, prompt: str | None, target: str | None, probes: tuple[str, ...], *, needs_instruction: bool
) -> dict[str, Any]:
    given = {"--prompt": prompt, "--target": target}
    if needs_instruction:
        given = {"--instruction": instruction, **given}
    missing = [flag for flag, value in given.items() if value is None]
    if missing:
        raise InputError(f"missing {', '.join(missing)}", hint="`ie edit --help` shows an example")
    empty = [flag for flag, value in given.items() if not (value or "").strip()]
    empty += ["--probe"] if not all(text.strip() for text in probes) else []
    if empty:
        raise InputError(f"{', '.join(empty)}: empty, expected a text")
    return {"instruction": instruction, "prompt": prompt, "target": target, "probes": probes}


def _text(value: object, name: str, where: str) -> str:
    if value is None:
        raise DataError(f"{where}: {name} is missing", hint=_FROM_HINT)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {name} is {value!r}, expected a text", hint=_FROM_HINT)
    return value


def check_took(result: dict[str, Any]) -> None:
    """End with exit code 3 when an edit did not take: the result is out by then."""
    edits = result.get("edits", [result])
    failed = [entry for entry in edits if not entry["took"]]
    if failed:
        first = failed[0]
        many = f"{len(failed)} of {len(edits)} edits did" if len(edits) > 1 else "the edit did"
        raise EditFailedError(
            f"{many} not take: {first['prompt']!r} gives {first['after']!r}, expected {first['target']!r}",
            hint="try another instruction, or an editor trained longer",
        )


def _suggest_weaker(result: dict[str, Any], render: Render) -> None:
    """Where a single edit took and moved a probe as well, say how to see whether half of it leaves the probe alone."""
    moved = next((probe["prompt"] for probe in result.get("probes", ()) if probe["changed"]), None)
    if moved is not None:
        shown = shlex.join(("ie", "apply-patch", result["patch"], "--scale", "0.5", "--prompt", moved))
        render.note(f"hint: `{shown}` shows whether a weaker edit leaves that probe alone")
