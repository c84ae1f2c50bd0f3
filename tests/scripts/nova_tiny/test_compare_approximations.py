"""The table of approximations, on small numbers."""

import json

import pytest
import torch
import yaml

import compare_approximations
from tests.tiny import make_model


@pytest.mark.slow
def test_times_and_scores_of_a_model(capsys):
    arguments = ["--model", "assets/nova-tiny", "--only", "reuse", "--num", "1", "--runs", "1"]
    assert compare_approximations.main(arguments) == 0
    head, _, *rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert head[-2:] == ["seen: right", "held out: right |"]
    assert [row[0] for row in rows] == ["| exact", "| guidance_reuse=2", "| guidance_reuse=4"]
    assert all(0 <= float(row[-2]) <= 1 for row in rows)
    assert [float(row[3]) > 0 for row in rows] == [False, True, True]


def test_times_of_a_config(tmp_path, capsys):
    sizes = dict(make_model().config)
    wanted = {n: v for n, v in sizes.items() if not n.startswith("_") and v is not None}
    config = tmp_path / "config.yaml"
    content = {"pipeline": {"paths": {"module_config": {"transformer": wanted}}}}
    config.write_text(yaml.safe_dump(json.loads(json.dumps(content))))
    small = ["--num-inference-steps", "4", "--num-diffusion-steps", "2", "--runs", "1"]
    threads = ["--threads", str(torch.get_num_threads())]
    only = ["--only", "sets", "reuse"]
    arguments = ["--config", str(config), "--size", "64", *only, *small, *threads]
    assert compare_approximations.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "exact",
        "guidance_reuse=2",
        "guidance_reuse=4",
        "half the sets",
    ]
    assert "right" not in lines[0]
