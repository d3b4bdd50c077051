"""A rank's share of its host: its CPUs, its GPU, its place in line; where a launcher has bound it, too."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch.distributed as td

from fastssl import dist, machine


@pytest.fixture
def sixteen_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(machine, "_sharers", 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")


def test_ranks_that_a_launcher_has_bound_do_not_divide_their_part_again(sixteen_cpus):
    """Catches half the loader's threads under `torchrun --numa-binding node`: two sockets, four ranks on each."""
    assert machine.threads_per_rank() == 2  # eight ranks on sixteen CPUs
    ours = machine.own_cpus()
    other_socket = ours[0], tuple(range(16, 32))
    machine.share_cpus([ours] * 4 + [other_socket] * 4)
    assert machine.threads_per_rank() == 4
    machine.share_cpus([ours, *[("another host", ours[1])] * 7])
    assert machine.threads_per_rank() == 16


def test_a_rank_compiles_with_its_own_threads_unless_the_user_said(monkeypatch):
    """Catches eight ranks that start thirty-two compilers each."""
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    machine.compile_threads(3)
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3"
    machine.compile_threads(5)
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3"


@pytest.mark.parametrize(("shown", "rank", "gpu"), [(8, 5, 5), (1, 5, 0), (0, 3, 0)])
def test_a_rank_that_is_shown_one_gpu_takes_that(monkeypatch, shown, rank, gpu):
    """Catches "invalid device ordinal" under `srun --gpus-per-task 1`."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: shown)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert dist.local_gpu() == gpu


def test_two_ranks_with_one_gpu_are_refused_by_name(monkeypatch):
    """Catches a hang in NCCL, or its own words, where more ranks than GPUs were started."""
    owners = [("one", "GPU-a"), ("one", "GPU-b"), ("two", "GPU-a"), ("one", "GPU-b")]
    monkeypatch.setattr(dist, "gather_objects", lambda own: owners)
    with pytest.raises(dist.SharedGpu, match="ranks 1, 3 share GPUs on one"):
        dist._check_own_gpu("GPU-b")
    monkeypatch.setattr(dist, "gather_objects", lambda own: owners[:3])
    dist._check_own_gpu("GPU-b")


def test_batch_norms_messages_go_first_on_a_gpu(monkeypatch):
    """Catches small messages, for which every layer waits, behind gradients that nobody waits for yet."""
    options = SimpleNamespace(is_high_priority_stream=False)
    monkeypatch.setattr(td, "ProcessGroupNCCL", SimpleNamespace(Options=lambda: options), raising=False)
    assert dist._first_in_line("nccl").is_high_priority_stream and dist._first_in_line("gloo") is None


def test_a_compiler_that_has_read_the_environment_is_told_too(monkeypatch):
    """Catches a share that comes after the import that would have read it."""
    import torch._inductor.config as compiler

    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.setattr(compiler, "compile_threads", 32)
    machine.compile_threads(3)
    assert compiler.compile_threads == 3
