"""What trained networks are worth: protocols, each a file here with an `evaluate(subject)`, found by its name."""

import pkgutil
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from fastssl.config.names import suggest
from fastssl.errors import ConfigError, FastsslError
from fastssl.evaluation.subject import Roles, Subject
from loaders.errors import LoaderError
from loaders.store.data import LABELLED, TRAIN, VALIDATION, DataSpec

FAILED = "failed_evaluations"  # among the scores of a run: {protocol: message} of those that could not be measured

_OF_A_RUN = (TRAIN, "unlabelled", LABELLED, VALIDATION)


class EvaluationProtocol(Protocol):
    """A module of this package: `soft-nn` is soft_nn.py. Where it measures on published sets, they are `SETS`, keys of
    `--data`. Where it asks something of the data, its `check(roles)` raises FastsslError or LoaderError for what is not
    there, before anything is read of images; training asks it before its first step."""

    def evaluate(self, subject: Subject) -> Mapping[str, Any]:
        """Numbers by name, and under the protocol's own name the settings and the interval they came with.

        Called by all ranks; all get the same answer.
        """


def load_protocol(name: str) -> EvaluationProtocol:
    """The protocol that users call `name`. Raises ConfigError where there is none."""
    if name not in _module_names() or not hasattr(_module(name), "evaluate"):
        raise ConfigError(f"unknown protocol {name!r}{suggest(name, protocol_names())}")
    protocol: EvaluationProtocol = _module(name)
    return protocol


def check_protocol(name: str, roles: Roles) -> None:
    """Raise FastsslError or LoaderError where the protocol `name` cannot measure on the images in `roles`, in words
    that name it."""
    check = getattr(load_protocol(name), "check", None)
    if check is not None:
        try:
            check(roles)
        except (FastsslError, LoaderError) as error:
            raise type(error)(f"{error} (asked for by the evaluation {name})") from None


def protocol_names() -> list[str]:
    """Every protocol there is, as users write it."""
    return [name for name in _module_names() if hasattr(_module(name), "evaluate")]


def divide(data: tuple[str, ...], protocols: Iterable[Any]) -> tuple[tuple[str, ...], dict[str, Path]]:
    """`--data` values apart: the run's own, and the published sets that `protocols` measure on, by key. Raises
    ConfigError for a key that is neither, and for a set that is given twice."""
    asked = [key for protocol in protocols for key in getattr(protocol, "SETS", ())]
    own, sets = [], {}
    for spec in data:
        key, path = DataSpec(spec).key, DataSpec(spec).path
        if key is None or key in _OF_A_RUN:
            own.append(spec)
        elif key not in asked:
            raise ConfigError(f"--data {spec}: no protocol asks for {key!r}{suggest(key, [*_OF_A_RUN, *asked])}")
        elif key in sets:
            raise ConfigError(f"--data {spec}: {key} is given twice")
        else:
            sets[key] = Path(path)
    return tuple(own), sets


def _module_names() -> list[str]:
    return [module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)]


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{name.replace('-', '_')}")
