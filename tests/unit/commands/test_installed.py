"""Which versions are refused at the door and which are told, from what pip writes down; and compilers."""

import configparser
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastssl.commands import installed
from fastssl.commands.main import main
from fastssl.errors import FastsslError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Put libraries, as pip would write them down, before those that are here."""

    def put(project, version, *requires, folder="site"):
        place = tmp_path / folder
        info = place / f"{project.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = [f"Requires-Dist: {line}" for line in requires]
        (info / "METADATA").write_text(
            "\n".join(["Metadata-Version: 2.1", f"Name: {project}", f"Version: {version}", *lines])
        )
        monkeypatch.syspath_prepend(place)

    return put


def test_pip_refuses_what_the_commands_refuse():
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    assert installed.TORCH in declared["options"]["install_requires"].splitlines()
    first, last = (".".join(map(str, release)) for release in (installed.TORCH_FROM, installed.TORCH_BELOW))
    assert f"torch>={first},<{last}" == installed.TORCH


@pytest.mark.parametrize("version", ["2.9.1", "2.15.0", "2.15.0.dev20261101+cu130", "3.0"])
def test_another_torch_is_refused_by_name_before_anything_else(version, environment):
    """Catches a version that trains wrongly without a word, as 2.11 once did, and one found out by a traceback."""
    environment("torch", version)
    result = CliRunner().invoke(main, ["train", "--out", "nowhere"])
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert line.startswith(f"Error: torch {version} is ") and line.endswith("pip install 'torch>=2.10,<2.15'")
    assert installed.torch_row({"version": version}).verdict == "broken"


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.1+cu130"])
def test_torch_that_was_seen_to_work_is_taken(version, environment):
    environment("torch", version)
    installed.refuse_torch()
    assert installed.torch_row({"version": version}).verdict in ("ok", "look")


def test_converting_needs_no_torch(environment, tmp_path):
    environment("torch", "2.9.1")
    result = CliRunner().invoke(main, ["convert-imagenet", str(tmp_path / "gone"), str(tmp_path / "out")])
    assert result.exit_code == 1 and "torch>=" not in result.output


def test_two_builds_in_one_folder_are_refused_and_two_on_the_path_are_told(environment, tmp_path):
    """One laid over another leaves files of both, which may well import."""
    environment("torch", "2.13.0+cpu")
    environment("torch", "2.14.1")
    with pytest.raises(
        FastsslError, match=f"two builds of torch lie in {tmp_path / 'site'}: pip uninstall torch twice"
    ):
        installed.refuse_torch()
    (tmp_path / "site" / "torch-2.13.0+cpu.dist-info" / "METADATA").unlink()
    (tmp_path / "site" / "torch-2.13.0+cpu.dist-info").rmdir()
    environment("torch", "2.13.0", folder="other")
    installed.refuse_torch()
    row = installed.torch_row({"version": "2.13.0"})
    assert row.verdict == "look" and f"2.13.0 in {tmp_path / 'other'} and 2.14.1 in {tmp_path / 'site'}" in row.remedy
    assert installed.torch_row({"version": "2.14.1"}).verdict == "broken"  # Python has another than pip says


def test_libraries_that_do_not_fit_are_told(environment):
    environment("torch", "2.14.1", 'triton~=3.8.0; platform_system == "Linux"', "sympy>=1.13", "numpy>=9; extra == 'x'")
    environment("triton", "3.6.0")
    environment("numpy", "2.4.1")
    environment("numba", "0.65.0", "llvmlite<0.48,>=0.47.0dev0", "numpy<2.4,>=1.22")
    environment("llvmlite", "0.47.0")
    environment("scikit-learn", "1.9.0", "numpy >=1.24")
    rows = {row.found: row.remedy for row in installed.pairs()}
    assert "numpy<2.4" in rows.pop("triton 3.6.0, numpy 2.4.1")
    assert rows == {
        "torch 2.14.1, triton 3.6.0": "torch asks for it: pip install 'triton~=3.8.0'",
        "numba 0.65.0, numpy 2.4.1": "numba asks for it: pip install 'numpy<2.4,>=1.22'",
    }


def test_libraries_of_this_environment_fit():
    assert [row.found for row in installed.pairs()] == ["libraries fit each other"]


@pytest.mark.parametrize(
    ("version", "asked", "fits"),
    [
        ("3.8.2", "~=3.8.0", True),
        ("3.9.0", "~=3.8.0", False),
        ("3.7.1", "==3.7.1", True),
        ("3.7.1", "==3.7", False),
        ("3.7", "==3.7.0", True),
        ("3.7.1", "==3.7.*", True),
        ("2.6", "<2.6,>=1.22", False),
        ("2.5.9", "<2.6,>=1.22", True),
        ("2.5", "!=2.5.0", False),
        ("13.0.2", "<=13.1.1.3,>=13.1.0.3", False),
        ("1", "", True),
    ],
)
def test_what_a_requirement_takes(version, asked, fits):
    assert installed.satisfies(installed.release(version), asked) is fits


@pytest.mark.parametrize(("version", "wrong"), [("0.9.0.20", True), ("0.10.1", False)])
def test_the_decoder_that_dali_brings_is_named(version, wrong, environment):
    environment("nvidia-nvimgcodec-cu13", version)
    found, what = installed.codec()
    assert found == f"nvImageCodec {version}" and ("regions of JPEGs" in what) is wrong


def test_no_compiler_is_told_and_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert [installed.compiler_row(num_gpus).found for num_gpus in (0, 1)] == ["none", "none"]
    assert "install gcc and g++" in installed.compiler_row(0).remedy
    for name in ("gcc", "g++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert [Path(installed.compiler_row(num).found).name for num in (0, 1)] == ["g++", "gcc"]
    monkeypatch.setattr(installed.sysconfig, "get_path", lambda name: str(tmp_path))
    assert installed.compiler_row(0).verdict == "look" and "python3-dev" in installed.compiler_row(0).remedy
