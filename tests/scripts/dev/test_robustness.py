"""Runs that are killed, damaged and starved, through the scripts that anyone can run."""

import pytest

import check_reliability
from benchmarking import runs

pytestmark = pytest.mark.slow


def rows(capsys):
    """The printed table, without its head."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("launcher, precision", [("plain", "no"), ("zero2_x2", "bf16")])
def test_killed_runs_end_with_the_same_bytes(tmp_path, capsys, launcher, precision):
    pytest.importorskip("deepspeed")
    options = ["--launcher", launcher, "--precision", precision, "--kills", "2", "--steps", "30"]
    assert check_reliability.main(["resume", "--output", str(tmp_path), *options]) == 0
    ((name, _, kills, losses, weights),) = rows(capsys)
    assert name == launcher
    assert len(kills.split(",")) == 2
    assert (losses, weights) == ("0", "0")
    straight = runs.read_metrics(tmp_path / f"{launcher}-{precision}" / "straight")
    assert [row[0] for row in straight] == list(range(30))
    assert len({row[3] for row in straight}) == 30  # the losses differ step by step


def test_differing_bytes_are_counted():
    assert runs.differing_bytes(b"abcd", b"abcd") == 0
    assert runs.differing_bytes(b"abcd", b"axcdef") == 3


@pytest.mark.parametrize(
    "fault, launcher, message, code",
    [
        ("loader worker killed", "plain", "DataLoader worker", "1"),
        ("rank killed", "plain_x2", "another process of the run is gone", "1"),
        ("corrupt record", "plain_x2", "cannot start: rank 1: ", "1"),
        ("NaN", "zero2_x2", "is not finite: rank 1: loss is nan on examples", "1"),
        ("SIGTERM", "plain", "received SIGTERM", "75"),
        ("SIGTERM", "zero2_x2", "rank 1: received SIGTERM", "1"),
    ],
)
def test_fault_ends_in_a_message(tmp_path, capsys, fault, launcher, message, code):
    options = ["--output", str(tmp_path), "--only", fault, "--launcher", launcher]
    check_reliability.main(["faults", *options])
    table = rows(capsys)
    for _, run, printed, exit_code, seconds, _ in table:
        assert run == launcher
        assert message in printed
        assert exit_code == code
        assert "processes left" not in seconds
    newest = table[-1][-1]
    assert newest.startswith("checkpoint-") or fault in ("corrupt record", "NaN")
