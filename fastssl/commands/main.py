"""The command `fastssl`: its subcommands, a file each beside this one."""

from __future__ import annotations

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


for _command in (
    train, evaluate, predict, embed, report, export, replay, profile, data, convert_imagenet, doctor, recipes,
):  # fmt: skip
    main.add_command(_command)
