"""What is said where the driver counts GPUs that torch cannot use."""

import pytest
import torch

from fastssl.errors import FastsslError
from fastssl.launch.ranks import Ranks
from fastssl.launch.start import start

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver by"


def test_a_driver_too_old_for_torchs_cuda_is_said_at_the_door(monkeypatch):
    """Catches the traceback of the first tensor on a GPU: the driver counts its GPUs whatever torch is built for."""

    def fail():
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    with pytest.raises(FastsslError) as error:
        start(Ranks(2, "cuda"), lambda: pytest.fail("the work was begun"), "fastssl train", lambda: None)
    says = "The NVIDIA driver on your system is too old (found version 12080)"
    assert str(error.value) == (
        f"torch cannot use this host's GPUs ({says}); this torch is built for CUDA 13.0, the driver is for 12.8 at "
        "most: update the driver, or install torch's build for CUDA 12 (pytorch.org)"
    )
