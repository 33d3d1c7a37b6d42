from __future__ import annotations

import inspect as reflection
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from ie.cli.app import app
from typer.models import ParameterInfo

import ie

COMMANDS = ("build", "train", "edit", "apply-patch", "eval", "inspect", "demo", "doctor")


def parameters(function: Any) -> dict[str, ParameterInfo]:
    hints = get_type_hints(function, include_extras=True)
    found = {}
    for name in reflection.signature(function).parameters:
        if get_origin(hints[name]) is Annotated:
            found[name] = get_args(hints[name])[1]
    return found


def callbacks() -> dict[str, Any]:
    return {command.name or command.callback.__name__: command for command in app.registered_commands}


def test_the_commands_are_those_promised(run: Any) -> None:
    assert tuple(callbacks()) == COMMANDS
    listed = run("--help").stdout
    assert all(f"  {name} " in listed for name in COMMANDS)


def test_without_a_command_the_help_is_shown(run: Any) -> None:
    assert run().stdout == run("--help").stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_documented(name: str, run: Any) -> None:
    text = run(name, "--help").stdout
    summary = text.splitlines()[2].strip()
    assert 10 < len(summary) <= 70
    examples = text.split("Examples:\n")[1].strip().splitlines()
    assert len(examples) == 2
    assert all(line.strip().startswith(f"ie {name}") for line in examples)
    assert "[" in text  # markup would have eaten the defaults


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_has_a_short_help(name: str) -> None:
    for parameter, info in parameters(callbacks()[name].callback).items():
        assert info.help and len(info.help) <= 70, parameter


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_the_shared_options(name: str, run: Any) -> None:
    text = run(name, "--help").stdout
    assert all(f"{flag} " in text for flag in ("--json", "--quiet", "--debug"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns(name: str, run: Any) -> None:
    text = run(name, "--help").stdout.split("Examples:")[0]
    assert max(map(len, text.splitlines())) <= 80


def test_version(run: Any) -> None:
    assert run("--version").stdout == f"ie {ie.__version__}\n"
