"""examples/job.toml: a job that runs as it stands, and whose commented lines are right too."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small_job import train

from fomoe_ext.config.io import load_config

FILE = Path(__file__).parents[2] / "examples/job.toml"
TEXT = FILE.read_text(encoding="utf-8")
OPTION = re.compile(r"^# (\w+ = .*)$", re.M)


def test_it_is_a_job():
    config = load_config(FILE)
    assert config.preset == "tiny" and config.sites.sites == 4
    steps = re.search(r"4 x 192 = (\d+) steps", TEXT)
    assert steps is not None
    assert config.run.local_steps * config.run.rounds == int(steps[1])


@pytest.mark.parametrize(
    "line", [line for line in OPTION.findall(TEXT) if "membership" not in line]
)
def test_a_commented_option_may_be_used(line, tmp_path):
    file = tmp_path / "job.toml"
    text = TEXT.replace(f"# {line}", line)
    if line.startswith("restarts"):
        text = text.replace("# [fault]", "[fault]").replace("# membership", "membership")
    file.write_text(text)
    assert text != TEXT and load_config(file) != load_config(FILE)


def test_it_trains(tmp_path):
    (tmp_path / "text.txt").write_text("A text that is long enough. " * 500)
    flags = "--rounds 2 --eval-rounds 0 --eval-tokens 256 --seq-len 32 --hidden-size 32"
    flags += " --intermediate-size 16 --num-layers 2 --num-experts 8 --threads 1"
    run = tmp_path / "run"
    given = ["--data", str(tmp_path / "text.txt"), "--run-dir", str(run), *flags.split()]
    result = train("--config", str(FILE), *given)
    assert result.returncode == 0, result.stderr
    report = json.loads((run / "report.json").read_text())
    assert report["run"]["rounds"] == 2 and report["run"]["codec"] == "int4"
    assert (run / "checkpoints").is_dir()
