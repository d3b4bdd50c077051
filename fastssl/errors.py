"""What a user can put right: exceptions shown as one line, exit codes of a run's ends, numbers out of range."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

EXIT_STOPPED = 85  # exit code of a run that saved and left on request: the same command continues it
EXIT_HUNG = 86  # of a run that its watchdog ended, for a rank hung or was gone: the same command continues it


class FastsslError(Exception):
    """Something a user can put right; shown as one line, without a traceback."""


class Stopped(FastsslError):
    """A run that was asked to stop has saved; ends its process with EXIT_STOPPED. `signum` is the signal that asked, on
    the ranks, and None where a launcher passes their end on."""

    def __init__(self, message: str, signum: int | None = None):
        super().__init__(message, signum)
        self.signum = signum

    def __str__(self) -> str:
        return str(self.args[0])


class Hung(FastsslError):
    """A rank hung or was gone, and the watchdog ended all; ends its process with EXIT_HUNG."""


class ConfigError(FastsslError, ValueError):
    """A recipe, key or value that does not exist or does not fit."""


def refuse_negative(settings: Any) -> None:
    """Raise ConfigError where a whole number among the fields of a dataclass, which counts something that there must
    be, is below 1, or a float below 0."""
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        least = {int: 1, float: 0.0}.get(type(value))
        if least is not None and not value >= least:
            raise ConfigError(f"{setting.name} is {value}, but must be {least:g} at least")
