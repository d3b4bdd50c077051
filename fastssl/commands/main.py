"""The command `fastssl`: its subcommands, a file each beside this one."""

from __future__ import annotations

import os
import sys

import click

from fastssl import before_torch
from fastssl.commands.convert_imagenet import convert_imagenet
from fastssl.commands.data import data
from fastssl.commands.doctor import doctor
from fastssl.commands.embed import embed
from fastssl.commands.evaluate import evaluate
from fastssl.commands.export import export
from fastssl.commands.help import Group
from fastssl.commands.predict import predict
from fastssl.commands.profile import profile
from fastssl.commands.recipes import recipes
from fastssl.commands.replay import replay
from fastssl.commands.report import report
from fastssl.commands.train import train


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fastssl-train")
def main() -> None:
    """Pre-train image encoders from many unlabelled and few labelled images."""
    before_torch()
    _check_folder()
    _open_streams()


def _check_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise click.ClickException("the folder that this is started in is gone: cd to one that is there") from None


def _open_streams() -> None:
    """Standard streams that were closed, as by `>&-`, lead to nothing: else the next files that are opened are these
    streams."""
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free, which is this
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115  # for as long as the process lives
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


for _command in (
    train, evaluate, predict, embed, report, export, replay, profile, data, convert_imagenet, doctor, recipes,
):  # fmt: skip
    main.add_command(_command)
