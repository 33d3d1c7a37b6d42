"""The `ie` application: its commands, and what happens when the command line itself is wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import ie
from ie import runtime

from .apply_patch import apply_patch
from .build import build
from .demo import demo
from .doctor import doctor
from .edit import edit
from .evaluate import evaluate
from .inspect import inspect
from .light import LightCommand, LightGroup
from .options import examples
from .render import error_lines, plain
from .train import train

__all__ = ["app", "main"]


class _Application(LightGroup):
    """Writes usage errors as every other error: `error:`, `hint:`, exit code 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "ie"
            error_lines(_one_line(error.format_message()), f"`{command} --help` lists what can be given")
            code = error.exit_code
        except typer.Abort:
            code = 1
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


def _one_line(message: str) -> str:
    text = " ".join(message.split()).rstrip(".").replace(": Value error, ", ": ")  # typer reads values by pydantic
    return text[:1].lower() + text[1:]


app = typer.Typer(
    name="ie",
    cls=_Application,
    help="Edit what a language model knows: one editor, many tasks, small patches.",
    epilog=examples("ie demo", "ie COMMAND --help"),
    rich_markup_mode=None,  # markup would eat `[...]` in help texts
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        plain(f"ie {ie.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        plain(context.get_help())


app.command(
    epilog=examples(
        "ie build",
        "ie build --source counterfact=cf.json --source zsre:test=zsre_eval.json --out data",
    )
)(build)
app.command(epilog=examples("ie train", "ie train --model ./llama --data data --config published-facts --quant 8bit"))(
    train
)
app.command(
    epilog=examples(
        'ie edit --task general --prompt "The capital of Australia is" --target Sydney',
        "ie edit --from edits.jsonl --joint --out many.safetensors",
    )
)(edit)
app.command(
    "apply-patch",
    epilog=examples(
        "ie apply-patch patch.safetensors --prompt 'The capital of Australia is'",
        "ie apply-patch a.safetensors b.safetensors --out both.safetensors --merge merged",
    ),
)(apply_patch)
app.command("eval", epilog=examples("ie eval --holdout zsre", "ie eval --methods none,finetune --markdown report.md"))(
    evaluate
)
app.command(cls=LightCommand, epilog=examples("ie inspect patch.safetensors", "ie inspect ie-editor --json"))(inspect)
app.command(epilog=examples("ie demo", "ie demo --minutes 1 --out my-demo"))(demo)
app.command(epilog=examples("ie doctor", "ie doctor --quant 8bit --json"))(doctor)


def main() -> None:
    """Run `ie` with the process's arguments."""
    runtime.prepare()
    app(prog_name="ie")
