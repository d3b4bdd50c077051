"""An evaluation protocol of one's own: how evenly embeddings spread over the sphere (Wang and Isola, ICML 2020,
arXiv 2005.10242). In `fastssl/evaluation/` it would be one of ours, by the name of its file."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastssl.evaluation.subject import Subject
from loaders.store.data import VALIDATION

_T = 2.0  # the paper's


def evaluate(subject: Subject) -> dict[str, Any]:
    """`uniformity` of the validation images' features: log of the mean of exp(-t |x - y|²) over pairs; lower is more
    even."""
    features_ND = F.normalize(subject.features(VALIDATION, subject.method.taps[0]).values, dim=1)
    distances = torch.pdist(features_ND)
    value = torch.log(torch.exp(-_T * distances.square()).mean()).item()
    return {"uniformity": value, "my_protocol": {"t": _T, "images": len(features_ND)}}
