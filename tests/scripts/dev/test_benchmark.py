"""The benchmarks' command line: both sides run, agree, and are reported."""

import json
import shutil
from pathlib import Path

import pytest

import benchmark

ROOT = Path(__file__).resolve().parents[3]
QUICK = ["--runs", "1", "--warmup", "0", "--threads", "1"]
TINY = ["--config", str(ROOT / "configs" / "nova_tiny_t2i.yaml"), "--size", "64"]
TINY += ["--arch", "vit_d2w64", "vit_d4w64", "mlp_d2w64"]


def run(tmp_path, *arguments):
    output = tmp_path / "report.json"
    assert benchmark.main([*arguments, *QUICK, "--output", str(output)]) == 0
    return json.loads(output.read_text())["results"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["generate", "--sets", "4", "--steps", "3"], ["train", "--batch", "2"]]
)
def test_both_sides_compute_the_same_with_fewer_operations(arguments, tmp_path, capsys):
    (result,) = run(tmp_path, *arguments, *TINY)
    ours, plain = result["sides"]
    assert result["relative_error"] < 1e-4
    assert 0 < ours["operations"] < plain["operations"]
    assert 0 < ours["flops"] <= plain["flops"]
    table = capsys.readouterr().out
    assert "| ours |" in table and "| plain |" in table and "differ by" in table


@pytest.mark.slow
def test_another_package_is_measured_by_its_path(tmp_path):
    shutil.copytree(ROOT / "diffnext", tmp_path / "other" / "diffnext")
    words = ["generate", "--sets", "4", "--steps", "3", *TINY]
    (result,) = run(tmp_path, *words, "--baseline", str(tmp_path / "other"))
    assert [side["name"] for side in result["sides"]] == ["ours", str(tmp_path / "other")]
    assert result["relative_error"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--baseline", "/nowhere"], "/nowhere holds no folder diffnext"),
        (["generate", "--runs", "0"], "--runs must be at least 1"),
        (["dance"], "invalid choice"),
    ],
)
def test_wrong_commands_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err


def test_a_size_that_does_not_fit_is_refused(capsys):
    assert benchmark.main(["generate", "--size", "100", *QUICK]) == 1
    assert "--size must be multiples of 32, got [100, 100]" in capsys.readouterr().err
