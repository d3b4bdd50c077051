"""What trained networks are worth: protocols, each a file here with an `evaluate(subject)`, found by its name."""

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from fastssl.config import ConfigError, suggest
from fastssl.evaluation.subject import Subject


class EvaluationProtocol(Protocol):
    """A module of this package: `soft-nn` is soft_nn.py."""

    def evaluate(self, subject: Subject) -> Mapping[str, Any]:
        """Numbers by name, and under the protocol's own name the settings and the interval they came with.

        Called by all ranks; all get the same answer.
        """


def load_protocol(name: str) -> EvaluationProtocol:
    """The protocol that users call `name`. Raises ConfigError where there is none."""
    if name not in _module_names() or not hasattr(_module(name), "evaluate"):
        raise ConfigError(f"unknown protocol {name!r}{suggest(name, protocol_names())}")
    return _module(name)


def protocol_names() -> list[str]:
    """Every protocol there is, as users write it."""
    return [name for name in _module_names() if hasattr(_module(name), "evaluate")]


def _module_names() -> list[str]:
    return [module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)]


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{name.replace('-', '_')}")
