"""The check of a GPU: what can be said of it without one, and its rehearsal on a CPU."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import check_gpu
from benchmarking.gpu_rows import ROWS
from benchmarking.processes import Job

ROOT = Path(__file__).resolve().parents[3]


def check(folder, *arguments):
    """Rehearse; returns the exit code, the outcomes by name, and the report's text."""
    code = check_gpu.main(["--rehearse", "--output", str(folder), *arguments])
    outcomes = json.loads((folder / "report.json").read_text())
    return code, {one["name"]: one for one in outcomes}, (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "dance"], "--only dance: no row has this name"),
        (["--baseline", "/nowhere"], "--baseline /nowhere holds no folder diffnext"),
        (["--limit-scale", "0"], "--limit-scale must be greater than 0"),
        ([], "there is no CUDA device: --rehearse"),
    ],
)
def test_wrong_commands_are_refused(arguments, message, capsys):
    if not arguments and torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(SystemExit) as ended:
        check_gpu.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_rows_and_limits_are_listed(capsys):
    assert check_gpu.main(["--list", "--only", "t2i"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "t2i eager           65 s",
        "t2i captured       150 s",
    ]


def test_all_rows_take_eight_minutes_at_most():
    alone = sum(row.limit for row in ROWS if row.is_timed)
    assert alone + max(row.limit for row in ROWS if not row.is_timed) <= 480


BAD = {
    "fails": ("raise ValueError('no such kernel')", "exit code 1: ValueError: no such kernel"),
    "says nothing": ("import sys; sys.exit(3)", "exit code 3: no message"),
    "is killed": ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
    "hangs": ("import time; time.sleep(600)", "stopped after 1 s"),
}


@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "side by side"])
def test_a_bad_row_costs_no_other(is_alone, tmp_path, capsys):
    figures = 'print(\'{"drawing": "a", "s": 1.5}\', flush=True)\n'
    codes = {**{name: figures + code for name, (code, _) in BAD.items()}, "passes": figures}
    jobs = [Job(n, [sys.executable, "-c", c], 1, is_alone) for n, c in codes.items()]
    outcomes = check_gpu.run_jobs(jobs, tmp_path, 2)
    errors = {outcome.name: outcome.error for outcome in outcomes}
    assert errors == {name: message for name, (_, message) in BAD.items()} | {"passes": ""}
    assert all(outcome.answers == [{"drawing": "a", "s": 1.5}] for outcome in outcomes)
    report = (tmp_path / "report.md").read_text()
    assert all(f"| {name} | {message} |" in report for name, (_, message) in BAD.items())
    assert report.count("| a | 1.5 |") == 5
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 10
    assert any(line.endswith("hangs: at most 1 s") for line in said)


def test_a_check_that_reaches_its_limits_fails(tmp_path):
    code, outcomes, report = check(tmp_path, "--limit-scale", "0.001", "--only", "training")
    assert code == 1
    assert len(outcomes) == 4
    assert all(one["error"].startswith("stopped after ") for one in outcomes.values())
    assert report.count("| stopped after ") == 4


def test_the_share_of_the_floor_is_told_of_every_mode():
    eager = {"drawing": "t2i", "s": 2.0, "floor, s": 0.5, "mode": "eager"}
    captured = {"drawing": "t2i", "s": 0.625, "mode": "captured"}
    shares = check_gpu.add_shares([eager, captured, {"drawing": "clip", "s": 1.0}, {"card": "H"}])
    assert [one.get("share of the floor") for one in shares] == [0.25, 0.8, None, None]


@pytest.mark.slow
def test_a_rehearsal_runs_every_row_to_its_end(tmp_path):
    code, outcomes, report = check(tmp_path)
    assert {name: one["error"] for name, one in outcomes.items()} == {row.name: "" for row in ROWS}
    assert code == 0
    assert all(one["answers"] for one in outcomes.values())
    assert all(f"| {row.name} | passed |" in report for row in ROWS)
    drawings = [one for name in outcomes for one in outcomes[name]["answers"] if "drawing" in one]
    assert {one["mode"] for one in drawings} == {"eager", "compiled", "captured"}
    assert len(drawings) == 3 * (2 + 3)
    assert all(one["s"] > 0 and one["launches"] > 0 for one in drawings)
    floors = [one["floor, s"] for one in drawings if one["mode"] == "eager"]
    assert all(0 < floor for floor in floors)
    for engine in ("plain", "zero2", "fsdp2"):
        (figures,) = outcomes[f"training {engine}"]["answers"]
        assert figures["differing bytes, metrics"] == figures["differing bytes, weights"] == 0
        assert figures["pictures"] == 2


@pytest.mark.slow
def test_another_package_draws_the_same_or_says_why_not(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "diffnext", other / "diffnext")
    arguments = ["--baseline", str(other), "--only", "baseline"]
    code, outcomes, _ = check(tmp_path, *arguments)
    assert code == 0
    for name, count in (("t2i baseline", 2), ("clip baseline", 3)):
        assert [one["mode"] for one in outcomes[name]["answers"]] == ["baseline"] * count
    (other / "diffnext" / "__init__.py").write_text("import os; os.kill(os.getppid(), 9)")
    code, outcomes, _ = check(tmp_path, *arguments)
    assert code == 1
    assert [one["error"] for one in outcomes.values()] == ["killed by SIGKILL"] * 2
