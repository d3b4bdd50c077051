"""How a command's help looks: on one screen, examples first."""

from __future__ import annotations

import textwrap

import click

WIDTH = 80
NAMES = 23  # columns of an option's name, beyond which its help begins a line below

EXAMPLES: dict[str, tuple[str, ...]] = {
    "fastssl": (
        "fastssl train",
        "fastssl train paws.mine --data /data/sorted --labels per-class=10",
        "fastssl evaluate runs/paws.digits-seed0 --protocol knn",
    ),
    "train": (
        "fastssl train paws.digits --set epochs=10 --out runs/try",
        "fastssl train paws.mine --data /data/sorted --labels per-class=10",
        "fastssl train paws.rn50_100ep --data /data/imagenet --gpus 64 --dry-run",
    ),
    "evaluate": ("fastssl evaluate runs/paws.digits-seed0 --protocol soft-nn --protocol knn",),
    "predict": (
        "fastssl predict runs/mine --data /data/photos --out photos.csv",
        "fastssl predict runs/mine --data /data/photos --out p.csv --review p.html",
        "fastssl predict EXPORT --data PHOTOS --data labelled=SORTED --out p.csv",
    ),
    "embed": ("fastssl embed runs/paws.digits-seed0",),
    "report": (
        "fastssl report runs/paws.digits-seed0",
        "fastssl report runs/a --compare runs/b --out both.html",
    ),
    "export": ("fastssl export runs/paws.digits-seed0 --out weights",),
    "replay": ("fastssl replay runs/paws.digits-seed0/nonfinite-step-00000012.json",),
    "profile": (
        "fastssl profile",
        "fastssl profile paws.rn50_100ep --data /data/imagenet --gpus 8",
    ),
    "data": ("fastssl data /data/photos --contact-sheet crops.html",),
    "convert-imagenet": ("fastssl convert-imagenet /data/ILSVRC2012 /data/imagenet --dry-run",),
    "doctor": ("fastssl doctor --data /data/imagenet",),
    "recipes": ("fastssl recipes",),
}


class _OnOneScreen(click.Command):
    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"Usage: {ctx.command_path} {' '.join(self.collect_usage_pieces(ctx))}\n\n")
        for example in EXAMPLES.get(ctx.info_name or "", EXAMPLES["fastssl"] if ctx.parent is None else ()):
            formatter.write(f"  {example}\n")
        text = " ".join((self.help or "").replace("\b", "").split())
        formatter.write("\n" + textwrap.fill(text, WIDTH) + "\n")
        self.format_options(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write("\nOptions:\n")
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and not option.hidden:
                formatter.write(_row(_names(option, ctx), _told(option, ctx)))


class Command(_OnOneScreen):
    """A command whose help is on one screen."""


class Group(_OnOneScreen, click.Group):
    """Commands with a line each."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write("\nCommands (fastssl COMMAND --help):\n")
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                sentence = " ".join((command.help or "").split()).partition(". ")[0].rstrip(".")
                formatter.write(_row(name, sentence + "."))
        super().format_options(ctx, formatter)


def _names(option: click.Option, ctx: click.Context) -> str:
    names = ", ".join(option.opts)
    return names if option.is_flag or option.count else f"{names} {_kind(option, ctx)}"


def _kind(option: click.Option, ctx: click.Context) -> str:
    """What stands for its value, the choices of few letters among it."""
    if option.metavar is None and isinstance(option.type, click.IntRange):
        return "N"
    kind = option.make_metavar(ctx)
    return kind if len(kind) < NAMES - len(option.opts[0]) else "HOW"


def _told(option: click.Option, ctx: click.Context) -> str:
    """Its help, its choices where there was no room for them, and its default."""
    record = option.get_help_record(ctx)  # an option may make its help as it is asked
    assert record is not None
    told = option.help or ""
    if isinstance(option.type, click.Choice) and _kind(option, ctx) == "HOW":
        told = f"{'|'.join(map(str, option.type.choices))}: {told}"
    if option.show_default and option.default not in (None, (), False):
        told = f"{told.rstrip('.')} [{option.default}]"
    return told


def _row(name: str, told: str) -> str:
    lines = textwrap.wrap(told, WIDTH - NAMES - 4) or [""]
    first = f"  {name:<{NAMES}}  " if len(name) <= NAMES else f"  {name}\n{' ' * (NAMES + 4)}"
    return first + f"\n{' ' * (NAMES + 4)}".join(lines) + "\n"
