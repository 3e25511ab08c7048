"""Jobs that outlive their sites, started as users start them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chaos_jobs import FLAGS, _text

from fomoe_ext.launch.processes import process_environment

pytest.importorskip("torchft", reason="the extra `fault` is not installed")


def train(run_dir: Path, more: list[str], faults: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-P", "-m", "fomoe_ext.cli", "train", *FLAGS, *_text(), *more]
    return subprocess.run(
        [*words, "--run-dir", str(run_dir)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FOMOE_FAULTS": faults},
        timeout=200,
    )


def test_the_launcher_starts_a_lost_site_again(tmp_path: Path) -> None:
    """Here the first one, which speaks to the user: another one goes on with that."""
    result = train(tmp_path, ["--rounds", "40", "--restarts", "1"], "kill 0 at 3 reduce")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "site 0 was killed by SIGKILL; it is restarted" in result.stderr
    rounds = re.findall(r"^round +(\d+)/40  loss", result.stdout, re.MULTILINE)
    assert list(dict.fromkeys(map(int, rounds))) == list(range(1, 41))
    assert "site 0 lost, its process has ended" in result.stdout
    assert "Sites that were lost or joined" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    joined = [site for event in report["story"] for site in event["joined"]]
    # On a machine that is busy enough it comes when all is done, and says so.
    assert joined == [0] or "the job has ended without it" in result.stdout, result.stdout
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines if line["kind"] == "round"] == list(range(1, 41))
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
    assert left == ""


def test_without_sites_the_job_has_failed(tmp_path: Path) -> None:
    faults = ",".join(f"kill {site} at 2 local" for site in range(2))
    result = train(tmp_path, ["--sites", "2"], faults)
    assert result.returncode == 137, result.stdout + result.stderr
    assert "no site is left" in result.stderr
    assert "--resume" not in result.stderr  # there is no checkpoint yet


def test_sites_of_several_machines_share_a_lighthouse(tmp_path: Path) -> None:
    """Started one by one, without a launcher, with a secret."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_LOG": "error"}
    env["FOMOE_SECRET"] = "the same words everywhere"
    lighthouse = subprocess.Popen(
        [sys.executable, "-P", "-m", "fomoe_ext.cli", "lighthouse", "--bind", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=env,
    )
    try:
        assert lighthouse.stdout is not None
        address = json.loads(lighthouse.stdout.readline())["lighthouse"]
        words = [sys.executable, "-P", "-m", "fomoe_ext.train", *FLAGS, *_text()]
        words += ["--lighthouse", address, "--run-dir", str(tmp_path / "run")]
        words += ["--sites", "2", "--batch-size", "4"]
        sites = [
            subprocess.Popen(
                words,
                env=process_environment(site, 2, "", env),
                stdout=(tmp_path / f"{site}.log").open("w"),
                stderr=subprocess.STDOUT,
            )
            for site in range(2)
        ]
        codes = [site.wait(150) for site in sites]
    finally:
        lighthouse.kill()
        lighthouse.wait()
    logs = "\n".join((tmp_path / f"{site}.log").read_text() for site in range(2))
    assert codes == [0, 0], logs
    assert (tmp_path / "run" / "report.json").exists()
