"""What `fastssl doctor` says of machines that lack something: a verdict and a remedy, never a crash. About 5 s."""

import json
import os
import socket
import sys

import pytest
from click.testing import CliRunner
from rich.console import Console

from fastssl.commands import examination as doctor
from fastssl.commands.main import main

MISSING = {"error": "ModuleNotFoundError: No module named 'x'", "missing": True}
CRASHED = {"error": "ended with code -11", "missing": False}
TORCH = {"version": "2.13.0+cu126", "cuda": "12.6", "devices": ["H200"], "capabilities": [[9, 0]], "nccl": "2.27.3"}
HOPPER = ["NVIDIA H200, 580.1"]


def test_this_machine_is_usable_and_says_so_as_json(tmp_path):
    """The whole command: catches a row that crashes, and output that no program can read."""
    (tmp_path / "train.beton").write_bytes(bytes(10_000_000))
    result = CliRunner().invoke(main, ["doctor", "--json", "--data", str(tmp_path)])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    rows = {row["name"]: row for row in answer["rows"]}
    names = [
        "torch",
        "libraries",
        "pairs",
        "compiler",
        "driver",
        "CUDA",
        "DALI",
        "FFCV",
        "Triton",
        "apex",
        "CPUs",
        "/dev/shm",
    ]
    assert [name for name in (*names, "open files", "locked memory", "SLURM", "--data") if name not in rows] == []
    assert answer["usable"] is True
    assert rows["torch"]["found"].startswith("2.") and "train.beton" in rows["--data"]["found"]
    assert [row["name"] for row in answer["rows"] if row["verdict"] == "look" and not row["remedy"]] == []


def test_doctor_needs_no_torch_to_say_that_it_is_missing():
    commands = "fastssl.commands.main, fastssl.commands.examination"
    code = f"import sys; sys.modules['torch'] = None; import {commands}; print('{{\"ok\": 1}}')"
    assert doctor._probe(code) == {"ok": 1}


def test_only_what_training_needs_makes_the_exit_code(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBES", {name: "raise SystemExit('no')" for name in doctor._PROBES})
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1 and "broken" in result.output and "Traceback" not in result.output
    optional = {"DALI", "FFCV", "Triton", "apex", "submitit"}
    assert all(row.verdict != "broken" for row in doctor.examine() if row.name in optional)


def test_the_table_shows_every_character(capsys):
    """Catches brackets that rich takes for a style: `pip install -e '.[dali]'` was shown as `'.'`."""
    row = doctor.Row("[a]", "/data/[b]/x:warning:", "look", "pip install -e '.[dali]'")
    Console(width=200).print(doctor.as_table([row]))
    shown = capsys.readouterr().out.split("\n")[1].split("  ")
    assert [cell.strip() for cell in shown if cell.strip()] == [row.name, row.found, row.verdict, row.remedy]


def test_crash_of_a_library_is_its_row_alone():
    """An extension built for another CPU or CUDA ends its process without a word."""
    assert doctor._probe("import os; os.kill(os.getpid(), 11)") == CRASHED
    row = doctor._dali(CRASHED, HOPPER)
    assert row.verdict == "look" and "reinstall" in row.remedy
    assert doctor._dali(MISSING, HOPPER).remedy.endswith("'.[dali]'")
    assert doctor._dali(MISSING, ["Tesla V100-SXM2-16GB, 580.1"]).remedy.endswith("'.[dali-cuda12]'")
    assert doctor._triton(MISSING, HOPPER).verdict == "look" and doctor._triton(MISSING, []).verdict == "absent"


@pytest.mark.parametrize("folder", ["multi_tensor_apply", "auth"])
def test_apex_is_nvidias_or_a_web_toolkit(folder, tmp_path, monkeypatch):
    (tmp_path / "apex" / folder).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = doctor._apex(doctor._probe(doctor._PROBES["apex"]))
    if folder == "auth":
        assert row.verdict == "look" and "web toolkit" in row.found and "pip uninstall apex" in row.remedy
    else:
        assert (row.found, row.verdict) == ("NVIDIA's", "ok")


def verdicts(torch, gpus):
    return [(row.name, row.verdict) for row in doctor._cuda(torch, gpus)]


def test_gpus_that_torch_cannot_use_are_told():
    kernels = ["sm_80", "sm_90", "compute_90"]
    assert verdicts(TORCH | {"compiled_for": kernels}, HOPPER) == [("CUDA", "ok"), ("NCCL", "ok")]
    volta = TORCH | {"compiled_for": kernels, "capabilities": [[7, 0]]}
    found = next(doctor._cuda(volta, HOPPER))
    assert found.verdict == "look" and "compute capability 7.0" in found.found and "CUDA 12.6" in found.remedy
    assert verdicts(TORCH | {"compiled_for": kernels, "nccl": None}, HOPPER)[1] == ("NCCL", "look")
    assert verdicts(TORCH | {"devices": []}, HOPPER) == [("CUDA", "look")]
    assert verdicts(TORCH | {"devices": [], "cuda": None}, []) == [("CUDA", "absent")]


def test_a_driver_too_old_for_torchs_cuda_is_told_with_the_build_to_install():
    cuda13 = TORCH | {"cuda": "13.0", "devices": [], "why": "The NVIDIA driver on your system is too old"}
    row = doctor._driver(["Tesla T4, 570.86.10"], cuda13)
    assert row.verdict == "look" and "needs 580.65.6 or newer" in row.remedy and "build for CUDA 12" in row.remedy
    assert next(doctor._cuda(cuda13, HOPPER)).remedy == cuda13["why"]
    assert doctor._driver(["NVIDIA H200, 580.95.05"], cuda13).verdict == "ok"
    assert doctor._driver(["Tesla K80, 470.1"], TORCH).remedy.endswith("update the driver")
    assert doctor._driver([], cuda13).verdict == "absent"


def test_what_a_gpu_is_too_old_for_is_told():
    (row,) = doctor._steps(TORCH | {"capabilities": [[9, 0], [7, 5]]})
    assert row.verdict == "look" and row.found.startswith("compute capability 7.5: eager") and "fp16" in row.remedy
    assert [row.verdict for row in doctor._steps(TORCH)] == ["ok"] and list(doctor._steps({"error": "no"})) == []


@pytest.mark.parametrize(
    ("capability", "compiled_for", "runs"),
    [
        ((8, 6), ["sm_80"], True),  # machine code of the generation
        ((8, 0), ["sm_86"], False),  # of a newer member
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),  # compiled when loaded
        ((7, 0), ["compute_75"], False),
        ((12, 0), ["sm_120"], True),
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_which_code_runs_on_which_gpu(capability, compiled_for, runs):
    assert doctor._runs_on(compiled_for, capability) is runs


def test_threads_beyond_cpus_and_gpus_without_cpus_are_told(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(doctor, "_cpu_quota", lambda: None)
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    assert doctor._cpus(0).verdict == doctor._cpus(1).verdict == "ok"
    assert "6 beside each of 2 GPUs" in doctor._cpus(2).remedy
    monkeypatch.setattr(doctor, "_cpu_quota", lambda: 2.5)
    assert doctor._cpus(0).remedy.endswith("taskset -c 0-1")
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert doctor._cpus(0).remedy == "threads share CPUs: set OMP_NUM_THREADS to 2 at most"


@pytest.mark.parametrize(
    ("address", "num_gpus", "verdict"),
    [("127.0.1.1", 8, "look"), ("", 8, "look"), ("10.0.0.7", 8, "ok"), ("127.0.1.1", 0, "ok")],
)
def test_a_host_that_others_would_not_find_is_told(address, num_gpus, verdict, monkeypatch):
    """Debian gives a host's name an address of the loopback: gloo would tell it to ranks on other hosts."""

    def asked(name):
        if not address:
            raise socket.gaierror(-2, "Name or service not known")
        return address

    monkeypatch.setattr(socket, "gethostbyname", asked)
    row = doctor._host(num_gpus)
    assert row.verdict == verdict and ("GLOO_SOCKET_IFNAME" in row.remedy) == (verdict == "look")


def test_small_shared_memory_and_slow_disks_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 64 << 20}))
    assert doctor._shared_memory().found == "0.06 GiB free" and "--shm-size" in doctor._shared_memory().remedy
    (tmp_path / "train.beton").write_bytes(bytes(1000))
    for rate_bytes_s, verdict in ((100e6, "look"), (200e6, "ok")):
        monkeypatch.setattr(doctor, "_read_rate", lambda path, rate=rate_bytes_s: (rate, 0.0))
        row = doctor._file_system(tmp_path, 1)
        assert row.verdict == verdict and f"{rate_bytes_s / 1e6:.0f} MB/s, cold" in row.found
    assert doctor._file_system(tmp_path, 8).verdict == "look"


def test_read_is_timed_and_known_to_be_cold_or_not(tmp_path):
    """The figure of a file in memory, taken for the disk's, is a hundred times too good."""
    path = tmp_path / "data"
    path.write_bytes(os.urandom(8 << 20))
    with path.open("rb+") as file:
        os.fsync(file.fileno())  # what is not written yet cannot be put out of memory
        file.read()
        before = doctor._cached_share(file.fileno(), 8 << 20)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        after = doctor._cached_share(file.fileno(), 8 << 20)
    if before is None or after == 1.0:
        pytest.skip(f"{tmp_path} does not tell what is in memory, or lies there")
    assert before == 1.0 and after < 0.5
    rate_bytes_s, cached = doctor._read_rate(path)
    assert cached < 0.5 and 1e6 < rate_bytes_s < 1e12


@pytest.mark.parametrize("what", ["nowhere", "empty"])
def test_data_that_cannot_be_read_is_broken(what, tmp_path):
    (tmp_path / "empty").mkdir()
    row = doctor._file_system(tmp_path / what, 1)
    assert row.verdict == "broken" and not doctor.usable([row])


def test_slurm_without_submitit_names_the_extra(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._slurm(MISSING).verdict == "absent"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor, "_said", lambda command: "slurm 24.05")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    row = doctor._slurm(MISSING)
    assert row.found == "slurm 24.05, in job 7; no submitit" and "'.[slurm]'" in row.remedy


def test_probes_ask_the_python_that_would_train():
    """Another one on the PATH may well have other libraries."""
    assert doctor._probe("import json, sys; print(json.dumps(sys.executable))") == sys.executable
