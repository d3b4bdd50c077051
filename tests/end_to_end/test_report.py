"""`fastssl report` as it is typed, and its page in a real browser where there is one."""

import shutil
import subprocess

import pytest

from fastssl.report.training import CONTENTS
from tests.end_to_end.command import CHANGES, run
from tests.unit.report.test_report import checked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the run `r` and its page."""
    folder = tmp_path_factory.mktemp("report")
    code, log = run(folder, "train", *CHANGES, "--out", "r")
    assert code == 0, log
    code, log = run(folder, "report", "r")
    assert (code, log.strip()) == (0, "r/report.html"), log
    return folder


def test_the_page_stands_alone(folder):
    page = checked((folder / "r/report.html").read_text())
    assert "paws.digits, seed 0" in page.text and "fastssl train --set" in page.text


def test_what_cannot_be_reported_is_one_line(folder):
    (folder / "empty").mkdir()
    for arguments, message in (
        (("empty",), "empty is no run directory: it has no resolved.json"),
        (("r", "--compare", "empty"), "empty is no run directory"),
        (("r", "--out", "r/metrics.jsonl/page.html"), "--out r/metrics.jsonl/page.html cannot be written"),
    ):
        code, log = run(folder, "report", *arguments)
        assert code == 1 and log.startswith("Error: ") and message in log and log.count("\n") == 1, log


def test_a_browser_opens_it_without_a_complaint(folder):
    """Markup, styles or drawings that the browser refuses; anything that it would fetch."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: the page is only parsed")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--dump-dom",
        (folder / "r/report.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    for name, title in CONTENTS.items():
        assert f'<section id="{name}"><h2>{title}</h2>' in done.stdout, name
