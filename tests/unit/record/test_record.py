"""The metrics file, bit for bit, and the lines a person reads."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fastssl.errors import FastsslError
from fastssl.record import recorder as record
from fastssl.record.recorder import Recorder, duration


def line(step: int, loss: float = 0.5) -> dict:
    parts = {"loss": loss, "cross_entropy": 1.25}
    return {"step": step, "epoch": step / 8, **parts, "lr": 0.1, "time": {"wait_share": 0.5}}


def write(run_dir: Path, steps: range, resume_step: int = 0) -> bytes:
    with Recorder(run_dir, main=True, resume_step=resume_step, plain=True) as recorder:
        for step in steps:
            recorder.log(line(step, math.pi / (step + 1)))
    return (run_dir / "metrics.jsonl").read_bytes()


def test_every_bit_of_a_float_survives_the_file(tmp_path: Path):
    loss = math.nextafter(0.1, 1.0)
    with Recorder(tmp_path, main=True, plain=True) as recorder:
        recorder.log(line(1, loss))
    (read,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert read["loss"].hex() == loss.hex()
    assert list(read) == ["step", "epoch", "loss", "cross_entropy", "lr", "time"]


def test_nan_and_infinities_do_not_make_the_file_unreadable_to_strict_parsers(tmp_path: Path):
    with Recorder(tmp_path, main=True, plain=True) as recorder:
        recorder.log({**line(1, math.nan), "parts": [math.inf, -math.inf, 2.0]})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    read = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert read["loss"] == "nan" and read["parts"] == ["inf", "-inf", 2.0]


def test_a_line_is_on_disk_before_the_next_step(tmp_path: Path):
    recorder = Recorder(tmp_path, main=True, plain=True)
    recorder.log(line(1))
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
    recorder.close()


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "ep', b'{"step": 9, "epoch": 1.0}'])
def test_resuming_repeats_no_line_and_gives_the_uninterrupted_file(tmp_path: Path, torn: bytes):
    whole = write(tmp_path / "whole", range(1, 13))
    write(tmp_path / "killed", range(1, 9))
    path = tmp_path / "killed" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    assert write(tmp_path / "killed", range(6, 13), resume_step=5) == whole
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["metrics.jsonl"]


def test_resuming_from_the_last_line_keeps_it(tmp_path: Path):
    whole = write(tmp_path, range(1, 6))
    assert write(tmp_path, range(0), resume_step=5) == whole


def test_starting_over_leaves_no_ghost_lines_not_even_of_step_0(tmp_path: Path):
    write(tmp_path, range(0, 4))
    assert write(tmp_path, range(0)) == b""


def test_a_line_damaged_in_the_middle_is_not_dropped_in_silence(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(FastsslError, match=r"metrics\.jsonl: line 2 is damaged"):
        Recorder(tmp_path, main=True, resume_step=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"st\n{"step": 3}\n'


def test_other_ranks_neither_print_nor_write_nor_truncate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = write(tmp_path, range(1, 4))
    capsys.readouterr()
    with Recorder(tmp_path, main=False) as recorder:
        recorder.announce("title", {"data": "digits"})
        recorder.log(line(1))
        recorder.evaluation({"step": 1, "epoch": 0.1, "evaluation": {"top1": 0.5}, "time": {}})
        recorder.warn("odd")
        recorder.finish({"top1": 0.5}, ["fastssl report"])
    Recorder(tmp_path / "none", main=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "none").exists()
    assert capsys.readouterr().out == ""


def test_plain_output_tells_the_run_from_plan_to_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    clock = {"images_per_s": 233.6, "wait_share": 0.031, "eta_s": 200.4, "elapsed_s": 1.0}
    with Recorder(tmp_path, main=True, plain=True) as recorder:
        recorder.announce("paws.digits, seed 0", {"data": "digits", "batch": "256, 1 rank"}, total_steps=100)
        recorder.log({"step": 10, "epoch": 1.25, "loss": -1.23456, "me": -2.2, "lr": 0.032, "lr_1": 1.0, "time": clock})
        recorder.warn("a slow disk")
        scores = {"soft_nn_top1": 0.97125, "knn_top1_k10": 0.9, "images": 9, "effective_rank": 12.0, "knn": {"k": 5}}
        recorder.evaluation({"step": 20, "epoch": 2.5, "evaluation": scores})
        recorder.finish({"soft_nn_top1": 0.98, "mean_prediction_entropy": 2.3, "seed": 0}, ["fastssl evaluate runs/x"])
    assert capsys.readouterr().out.splitlines() == [
        "paws.digits, seed 0",
        "  data   digits",
        "  batch  256, 1 rank",
        "step 10/100  epoch 1.2  loss -1.235  me -2.200  lr 0.03200  lr_1 1.000  234 images/s  wait 3%  eta 3 min 20 s",
        "warning: a slow disk",
        "step 20/100  epoch 2.5  evaluation  soft_nn_top1 0.9712  effective_rank 12.00",
        "result",
        "  soft_nn_top1  0.9800",
        "next",
        "  fastssl evaluate runs/x",
    ]
    (_, evaluation) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert evaluation["evaluation"] == scores


def test_plain_logs_stay_small_and_the_file_stays_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    hands = iter(range(1, 1000))  # a second at each look
    monkeypatch.setattr(record.time, "monotonic", lambda: float(next(hands)))
    with Recorder(tmp_path, main=True, plain=True) as recorder:
        recorder.announce("title", {}, total_steps=100)
        for step in range(1, 101):
            recorder.log(line(step))
    shown = [int(text.split()[1].split("/")[0]) for text in capsys.readouterr().out.splitlines()[1:]]
    assert shown[:3] == [1, 11, 21] and shown[-1] == 100 and len(shown) <= 11
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100


def test_a_terminal_has_one_moving_line_that_never_wraps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Recorder(tmp_path, main=True, plain=False) as recorder:
        recorder.announce("title", {}, total_steps=4)
        for step in (1, 2, 3, 4):
            recorder.log({**line(step), **{f"part_{k}": 0.5 for k in range(9)}})
        recorder.evaluation({"step": 4, "epoch": 0.5, "evaluation": {"top1": 0.5}})
    out = capsys.readouterr().out.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert out.count("\n") == 2  # the title and the evaluation
    title, _, moving = out.partition("\n")
    states = moving.split("\r\x1b[2K")
    assert [s.split()[2] for s in states[:4]] == ["1/4", "2/4", "3/4", "4/4"]
    assert states[0].startswith("━━━━────────────") and states[3].startswith("━" * 16)
    assert all(len(s) <= 79 and s.endswith("  lr 0.1000  wait 50%") for s in states[:4])
    assert states[4] == "step 4/4  epoch 0.5  evaluation  top1 0.5000\n"


def test_durations_carry_into_minutes_and_hours():
    assert [duration(s) for s in (0.4, 59.6, 200, 7500)] == ["0 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]
