"""PAWS's recipes with RoPAWS's targets: for unlabelled images of which some belong to none of the classes."""

from __future__ import annotations

from fastssl.methods.base import Stages
from fastssl.methods.paws import Ropaws
from fastssl.recipes import paws
from fastssl.recipes.images import TYPICAL, Images


def cifar10_small() -> Stages:
    """As paws.cifar10_small with RoPAWS's targets."""
    return _robust(paws.cifar10_small())


def mine(images: Images = TYPICAL) -> Stages:
    """As paws.mine, where your unlabelled images are of other things, too."""
    return _robust(paws.mine(images))


def rn50_100ep() -> Stages:
    """As paws.rn50_100ep with RoPAWS's targets: the paper reports .4 points more (arXiv 2302.14483)."""
    return _robust(paws.rn50_100ep())


def rn50_200ep() -> Stages:
    """As rn50_100ep for 200 epochs."""
    return _robust(paws.rn50_200ep())


def rn50_300ep() -> Stages:
    """As rn50_100ep for 300 epochs."""
    return _robust(paws.rn50_300ep())


def rn50_100ep_1pct() -> Stages:
    """As paws.rn50_100ep_1pct with RoPAWS's targets."""
    return _robust(paws.rn50_100ep_1pct())


def rn50_300ep_1pct() -> Stages:
    """As paws.rn50_300ep_1pct with RoPAWS's targets."""
    return _robust(paws.rn50_300ep_1pct())


def _robust(stages: Stages) -> Stages:
    *labels_alone, pretrain = stages
    return (*labels_alone, pretrain.with_settings(ropaws=Ropaws()))
