"""Commands that start at once: their parameters are read without pydantic.

Typer converts every value by pydantic, also the `None` of a flag that was not given; importing pydantic takes as long
as all that `ie --help` needs. A path given as text, and a value that is not there, need no such conversion.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

__all__ = ["LightCommand", "LightGroup"]


class _Light:
    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, `--help` included."""
        return [_lightened(parameter) for parameter in super().get_params(ctx)]  # type: ignore[misc]


class LightCommand(_Light, TyperCommand):
    """A command whose only values are paths and flags."""


class LightGroup(_Light, TyperGroup):
    """The group of commands; it has flags alone."""


def _lightened(parameter: Any) -> Any:
    if "process_value" not in vars(parameter):  # the help option is made once and seen often
        parameter.process_value = partial(_process, parameter, parameter.process_value)
    return parameter


def _process(parameter: Any, convert: Any, context: Any, value: Any) -> Any:
    if value is None and not parameter.required:  # a flag that was not given, `--help` among them
        return parameter.callback(context, parameter, None) if parameter.callback else None
    if isinstance(value, str) and parameter.type_descriptor.annotation is Path:
        return Path(value)
    return convert(context, value)
