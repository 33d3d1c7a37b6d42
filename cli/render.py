"""The only writer to the terminal: results on stdout, everything else on stderr.

With `--json` stdout holds exactly one JSON object, or nothing when the command fails. Without a terminal there are no
colours and no bars. Rich is imported when a table is drawn, so errors and JSON come without it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from ie.errors import IEError, is_out_of_memory

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Render", "error_lines", "json_text", "plain", "reporting", "visible"]


class Render:
    """One command's way to the terminal.

    Args:
        as_json: stdout gets one JSON object instead of tables.
        quiet: no notes and no progress on stderr.
        debug: tracebacks and the libraries' debug logs on stderr.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, debug: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.debug = debug

    @property
    def live(self) -> bool:
        """Whether a progress bar may be drawn."""
        return not self.quiet and sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")

    def note(self, text: str) -> None:
        """Tell the user something on the way."""
        if not self.quiet:
            sys.stderr.write(visible(text) + "\n")
            sys.stderr.flush()

    def result(self, data: Mapping[str, Any], *human: RenderableType) -> None:
        """Write the command's result: `data` with --json, else the renderables."""
        if self.as_json:
            sys.stdout.write(json_text(data))
            sys.stdout.flush()
            return
        console = self.console()
        for part in human:
            console.print(part)

    def console(self, *, stderr: bool = False) -> Console:
        """Return a Rich console; texts are shown as they are, without markup or emoji codes."""
        from rich.console import Console

        stream = sys.stderr if stderr else sys.stdout
        width = None if stream.isatty() else 80
        return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def json_text(data: Mapping[str, Any]) -> str:
    """A result as JSON; ASCII only, so that no locale or pipe can break it."""
    return json.dumps(_finite(data), indent=2, default=str, allow_nan=False) + "\n"


def visible(text: str) -> str:
    """Keep a stranger's file from steering the terminal: control characters are shown, not sent."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else f"\\x{ord(char):02x}" for char in text)


def plain(text: str) -> None:
    """Write a text to stdout as it is."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def error_lines(message: str, hint: str | None = None) -> None:
    """Write `error: ...` and `hint: ...` to stderr."""
    sys.stderr.write(visible(f"error: {message}\n"))
    if hint:
        sys.stderr.write(visible(f"hint: {hint}\n"))
    sys.stderr.flush()


@contextmanager
def reporting(*, json: bool, quiet: bool, debug: bool, logs: bool = True) -> Iterator[Render]:
    """Run a command's body; turn whatever it raises into messages on stderr and an exit code.

    Args:
        json: see `Render`.
        quiet: see `Render`.
        debug: see `Render`.
        logs: set up the logs of libraries; a command that uses none starts faster without.
    """
    render = Render(as_json=json, quiet=quiet, debug=debug)
    if logs:
        _set_up_logs(render)
    try:
        yield render
    except IEError as error:
        _fail(error, render, error.message, error.hint, error.exit_code)
    except KeyboardInterrupt as error:
        _fail(error, render, "interrupted", _interrupt_hint(error), 130)
    except BrokenPipeError:
        raise  # the reader has gone (`ie ... | head`): the application ends without a word
    except Exception as error:
        if is_out_of_memory(error):
            said = f"out of memory: {_first_line(error)}"
            _fail(error, render, said, "take --quant 8bit or 4bit; `ie doctor --model M` estimates what is needed", 1)
        hint = None if debug else "this is unexpected; run again with --debug to see where it comes from"
        _fail(error, render, f"{type(error).__name__}: {_first_line(error)}", hint, 1)


def _fail(error: BaseException, render: Render, message: str, hint: str | None, code: int) -> NoReturn:
    if render.debug:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    error_lines(message, hint)
    raise SystemExit(code) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")


def _interrupt_hint(error: KeyboardInterrupt) -> str | None:
    """A library that saved something before it gave up says so in the exception's argument."""
    return str(error.args[0]) if error.args else None


def _set_up_logs(render: Render) -> None:
    """Send the libraries' logs to stderr; keep their progress bars off pipes."""
    import logging  # here: `ie --help` has no use for it

    level = logging.DEBUG if render.debug else logging.ERROR if render.quiet else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s" if render.debug else "%(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    if not render.live:
        os.environ["TQDM_DISABLE"] = "1"


def _finite(value: Any) -> Any:
    """Replace figures that JSON has no word for (NaN, infinity) by null, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
