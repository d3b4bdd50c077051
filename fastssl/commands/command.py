"""What all commands share: errors in the user's words, and options that several of them take."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from fastssl.commands.help import Command
from fastssl.commands.installed import refuse_torch
from fastssl.engine.settings import Option, Settings
from fastssl.errors import EXIT_HUNG, EXIT_STOPPED, ConfigError, FastsslError, Hung, Stopped
from loaders.errors import LoaderError

if TYPE_CHECKING:
    import torch

Function = Callable[..., Any]

RUN = click.argument("run", type=click.Path(path_type=Path))
DATA = click.option("--data", multiple=True, metavar="[KEY=]PATH", help="KEY: unlabelled, labelled, validation, masks")
CHANGES = click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a field of the recipe.")
GPUS = click.option("--gpus", type=click.IntRange(1), help="Ranks, one a GPU, on all hosts together.")
CPU_RANKS = click.option(
    "--cpu-ranks", type=click.IntRange(1), help="Ranks on CPUs, here unless a launcher starts them."
)


def command(name: str | None = None, *, computes: bool = True) -> Callable[[Function], click.Command]:
    """A command whose errors, where a user can put them right, are one line and exit code 1. One that computes is
    refused with a torch that training was not seen right with."""
    made = click.command(name, cls=Command)
    return lambda function: made(_in_users_words(_with_torch(function) if computes else function))


def _with_torch(function: Function) -> Function:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        refuse_torch()
        return function(*args, **kwargs)

    return checked


def _in_users_words(function: Function) -> Function:
    """Turn our errors into click's: one line, no traceback."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Stopped as stop:
            if str(stop):  # one rank of all says it
                click.echo(stop, err=True)
            sys.exit(EXIT_STOPPED)
        except Hung as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(EXIT_HUNG)
        except (FastsslError, LoaderError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            raise click.ClickException("interrupted; the same command continues from the last checkpoint") from None

    return wrapped


def as_typed() -> str:
    """The command that this process was started with."""
    return shlex.join(["fastssl", *sys.argv[1:]])


def out(help: str) -> Callable[[Function], Function]:
    """The option that says where to write."""
    return click.option("--out", type=click.Path(path_type=Path), help=help)


def ranks(gpus: int | None, cpu_ranks: int | None) -> dict[str, Any]:
    """`device` and `world` of a job. Raises ConfigError where both are given."""
    if gpus and cpu_ranks:
        raise ConfigError("--gpus and --cpu-ranks: give one of them")
    return {"device": "cuda" if gpus else "cpu", "world": gpus or cpu_ranks or 1}


def on_ranks(gpus: int | None, cpu_ranks: int | None, work: Callable[[torch.device], Any]) -> Any:
    """Do `work` on the ranks asked for: by default here alone, on a GPU where there is one. Raises ConfigError where
    both are given."""
    import torch

    from fastssl.api.on_ranks import looked_at_on_ranks
    from fastssl.launch.ranks import Ranks

    asked = ranks(gpus, cpu_ranks)
    if gpus is None and cpu_ranks is None and torch.cuda.is_available():
        asked["device"] = "cuda"
    return looked_at_on_ranks(Ranks(**asked), work, as_typed())


def settings(*names: str) -> Callable[[Function], Function]:
    """The options of these fields of `Settings`, by default of all; they reach the command under the fields' names."""
    fields = Settings.__dataclass_fields__

    def with_options(function: Function) -> Function:
        for name in reversed(names or tuple(fields)):
            function = _as_click(name, fields[name].metadata["option"], fields[name].default)(function)
        return function

    return with_options


def _as_click(name: str, option: Option, default: Any) -> Callable[[Function], Function]:
    """An option of click's whose kind follows from the field's type."""
    kind = get_type_hints(Settings)[name]
    if get_origin(kind) in (Union, UnionType):  # the first, where a Literal is in it
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    said: dict[str, Any] = {"help": option.help, "metavar": option.metavar}
    if kind is bool:
        said |= {"is_flag": True}
    elif get_origin(kind) is tuple:
        said |= {"multiple": True}
    elif get_origin(kind) is Literal:
        said |= {"type": click.Choice(get_args(kind)), "default": default, "show_default": default is not None}
    elif kind is Path:
        said |= {"type": click.Path(path_type=Path)}
    else:
        said |= {"type": click.FloatRange(option.least) if kind is float else str, "default": default}
        said |= {"show_default": True}
    return click.option(option.flag, name, **said)
