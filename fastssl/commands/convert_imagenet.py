"""`fastssl convert-imagenet`: archives and folders to `.beton`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from fastssl.commands.command import command
from fastssl.errors import ConfigError


@command("convert-imagenet", computes=False)
@click.argument("src", required=False, type=click.Path(path_type=Path))
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--no-decode-check", is_flag=True, help="Trust that every file decodes; headers are read all the same.")
@click.option("--subset", metavar="LIST", help="Only these training images: a list's name or path.")
@click.option("--max-side", type=click.IntRange(1), help="Write every image anew, no side longer than that in pixels.")
@click.option("--quality", type=click.IntRange(1, 100), help="Of JPEGs that --max-side writes (default 90).")
@click.option("--pixels", type=click.Choice(["jpeg", "raw"]), default="jpeg", help="raw: store images decoded.")
@click.option("--reencode", hidden=True)
@click.option("--dry-run", is_flag=True, help="Print what would be done and the disk it needs.")
@click.option("--verify", type=click.Path(path_type=Path), metavar="OUT", help="Read OUT again, against its manifest.")
def convert_imagenet(
    src: Path | None,
    out: Path | None,
    no_decode_check: bool,
    subset: str | None,
    max_side: int | None,
    quality: int | None,
    pixels: str,
    reencode: str | None,
    dry_run: bool,
    verify: Path | None,
) -> None:
    """SRC, whatever --data takes, parquet files and TensorFlow Datasets' records, to OUT/train.beton, OUT/val.beton and
    OUT/manifest.json. The same command continues a conversion that was stopped. SRC is only read."""
    from fastssl.commands import converting
    from loaders.convert import conversion as convert
    from loaders.convert.manifest import verify as verified

    start_s = time.monotonic()
    if verify is not None:
        if src is not None or dry_run:
            raise ConfigError("--verify OUT stands alone: it reads a finished conversion")
        with converting.reporting() as report:
            manifest = verified(verify, report)
        click.echo(converting.summary(manifest, time.monotonic() - start_s))
        return
    if src is None or out is None:
        raise ConfigError("convert-imagenet takes SRC and OUT, or --verify OUT")
    if reencode is not None:
        raise ConfigError("--reencode QUALITY,MAX_SIDE is now --max-side N [--quality Q]")
    anew = converting.reencoded(max_side, quality)
    plan = convert.prepare(src, convert.Options(not no_decode_check, anew, pixels == "raw", subset))
    click.echo(converting.described(plan, out))
    if not dry_run:
        with converting.reporting() as report:
            manifest = convert.convert(plan, out, report)
        click.echo(converting.summary(manifest, time.monotonic() - start_s))
