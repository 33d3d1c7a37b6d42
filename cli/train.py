"""`ie train`: one editor for all tasks of a dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ie.errors import InputError
from ie.training.place import check_not_begun, training_folder

from .files import check_model, check_names, check_new_folder, read_dataset_info, split_names
from .options import (
    DEFAULT_DATA,
    DEFAULT_EDITOR,
    DEFAULT_HOLDOUT,
    DEFAULT_MODEL,
    Data,
    Debug,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Quant,
    Quiet,
    Seed,
)
from .render import Render, reporting

if TYPE_CHECKING:
    from ie.training.settings import TrainSettings

__all__ = ["train"]


def _of_launcher(name: str, alone: int) -> int:
    """A number that a launcher of several processes sets."""
    text = os.environ.get(name, str(alone))
    if not text.isdecimal():
        raise InputError(f"the environment's {name} is {text!r}, expected a number as torchrun sets it")
    return int(text)


def _read_config(context: typer.Context, name: str | None) -> str | None:
    """Take the values of --config as defaults: a flag on the command line wins."""
    if name is None or context.resilient_parsing:
        return name
    from ie.training.config import find_config, read_config

    try:
        values = read_config(find_config(name))
    except InputError as error:
        raise typer.BadParameter(f"{error.message} ({error.hint})" if error.hint else error.message) from error
    flags = {parameter.name for parameter in context.command.params}
    context.obj = {key: value for key, value in values.items() if key not in flags}  # settings without a flag
    context.default_map = {key: _as_flag(key, value) for key, value in values.items() if key in flags}
    return name


def _as_flag(key: str, value: Any) -> Any:
    """A value as the command line would have it."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or ("none" if key == "holdout" else None)
    return value


def train(
    context: typer.Context,
    model: Model = DEFAULT_MODEL,
    data: Data = DEFAULT_DATA,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Editor folder to write.")] = DEFAULT_EDITOR,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="Tasks to train on.", show_default="all others")
    ] = None,
    holdout: Annotated[
        str, typer.Option("--holdout", metavar="T", help="Tasks left out, for `ie eval`; or none.")
    ] = DEFAULT_HOLDOUT,
    method: Annotated[
        Literal["instructedit", "mend", "instructedit-joint"],
        typer.Option("--method", help="mend: without instructions; instructedit-joint: for `ie edit --joint`."),
    ] = "instructedit",
    quant: Quant = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: Annotated[
        Literal["auto"] | None,
        typer.Option("--device-map", help="auto: spread a large base over all devices.", show_default="one device"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="Training steps.", show_default="150")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes", metavar="X", min=0.01, help="Stop after so long, steps or not.", show_default="no limit"
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", min=1, help="Edits in a step.", show_default="16"),
    ] = None,
    balance: Annotated[
        bool, typer.Option("--balance/--no-balance", help="Draw tasks evenly, or by their size.")
    ] = True,
    seed: Seed = 0,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="F.yaml",
            is_eager=True,
            callback=_read_config,
            help="Flags from a file, or a ready configuration's name.",
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option("--checkpoint-every", metavar="N", min=1, help="Steps between checkpoints.", show_default="none"),
    ] = None,
    checkpoint_minutes: Annotated[
        float | None,
        typer.Option("--checkpoint-minutes", metavar="X", min=0.001, help="Most time between.", show_default="5"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last good checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show configuration, memory and time; train nothing.")
    ] = False,
    report_to: Annotated[
        Literal["tensorboard", "wandb", "trackio"] | None,
        typer.Option("--report-to", help="A tracker beside metrics.jsonl.", show_default="none"),
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train one editor for all tasks of a dataset."""
    with reporting(json=json, quiet=quiet, debug=debug) as render:
        rank, n_processes = _of_launcher("RANK", 0), _of_launcher("WORLD_SIZE", 1)
        flags = {
            "model": model, "data": data, "out": out, "tasks": split_names(tasks, "--tasks") or None,
            "method": method, "quant": quant, "dtype": dtype, "device": device,
            "device_map": device_map, "steps": steps, "minutes": minutes,
            "batch_size": batch_size, "balance": balance, "seed": seed, "force": force, "resume": resume,
            "checkpoint_every": checkpoint_every, "checkpoint_minutes": checkpoint_minutes, "report_to": report_to,
        }  # fmt: skip
        more = dict(context.obj or {})
        if more:  # settings that only --config can name: check them before anything is built
            _settings(more, f"--config {config}: ")
        flags["holdout"] = left_out = () if holdout == "none" else split_names(holdout, "--holdout")
        values = {name: value for name, value in flags.items() if value is not None} | more
        if dry_run:
            check_model(model)
            _show_plan(render, values)
            return
        if resume:
            check_new_folder(out, "editor.json", force=True)
            values = _begun(out) | {name: value for name, value in flags.items() if _given(context, name)} | more
        else:
            check_model(model)
            if not force:
                check_not_begun(out)  # before the editor so far, which Ctrl-C leaves too, is said to be in the way
            check_new_folder(out, "editor.json", force=force)
            explicit, alone = _given(context, "holdout"), n_processes == 1
            held = _check_tasks(render, data, tasks, left_out, explicit=explicit, alone=alone)
            values = values | {"holdout": held} | more
        _run(render, values | {"out": out}, shown=rank == 0)


def _show_plan(render: Render, values: dict[str, Any]) -> None:
    from ie.training.dryrun import dry_run

    from .tables import plan_view

    result = dry_run(_settings(values, ""))
    render.result(result, *plan_view(result))


def _begun(out: Path) -> dict[str, Any]:
    """The settings of the run that is to be resumed.

    Raises:
        InputError: if there is none, because none was begun or it is finished.
    """
    from ie.training.config import CONFIG, read_config

    begun = training_folder(out) / CONFIG
    if not begun.is_file():
        what = f"{out} is finished" if out.exists() else f"no run for {out} was begun"
        raise InputError(f"--resume: {what}, there is nothing to go on with", hint="leave --resume out to train anew")
    return read_config(begun)


def _run(render: Render, values: dict[str, Any], *, shown: bool) -> None:
    from ie.training import train as train_editor

    from .progress import TrainingProgress
    from .tables import train_view

    settings = _settings(values, "")
    with TrainingProgress(render) as progress:
        result = train_editor(settings, on_event=progress)
    if shown:
        render.result(result, *train_view(result))


def _settings(values: dict[str, Any], where: str) -> TrainSettings:
    """Make the settings of a run; all values that it cannot have are named in one error."""
    from pydantic import ValidationError

    from ie.training.settings import TrainSettings

    try:
        return TrainSettings(**values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        hint = "known are the flags of `ie train` and the fields of ie.training.settings.TrainSettings"
        raise InputError(f"{where}{faults}", hint=hint) from error


def _given(context: typer.Context, name: str) -> bool:
    """Say whether a value comes from the user (command line or --config), not from the default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _check_tasks(
    render: Render, data: Path, tasks: str | None, left_out: tuple[str, ...], *, explicit: bool, alone: bool
) -> tuple[str, ...]:
    """Check --tasks and --holdout against the dataset; without a default dataset, build it first.

    Returns:
        The tasks to leave out.
    """
    names = split_names(tasks, "--tasks")
    if data == DEFAULT_DATA and not data.exists() and alone:
        from ie.data.build import build

        render.note(f"no dataset at {data}: building the default one first")
        build(data)
    known = tuple(read_dataset_info(data)["tasks"])
    check_names(names, known, "--tasks", "task")
    if explicit:
        check_names(left_out, known, "--holdout", "task")
    both = [name for name in names if name in left_out]
    if both:
        raise InputError(
            f"{', '.join(both)} is in --tasks and held out",
            hint="a task is trained on or held out, not both: give --holdout none, or other names",
        )
    if not set(names or known) - set(left_out):
        raise InputError("no task is left to train on", hint="give other --tasks, or --holdout none")
    return tuple(name for name in left_out if name in known)
