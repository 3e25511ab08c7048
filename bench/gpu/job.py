"""A training job of two sites on one device: ten rounds, then again from a checkpoint in between.

Both sites use the same GPU, in separate processes, and meet through gloo, which copies what they
exchange to the CPU. It also runs where tyro or rich is missing: then the sites start from the
configuration file alone, and print no tables. Otherwise it is the same as `fomoe train`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from bench.gpu import measured
from bench.gpu.measured import Results

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, SAVED = 10, 5
SITE = "--site"
RICH = ("rich", "rich.console", "rich.table", "rich.progress")


def installed(module: str) -> bool:
    """Whether the module can be imported."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def write_config(path: Path, folder: Path, device: str, resume: str | None = None) -> Path:
    """Writes the job's configuration, with the run folder `folder`; returns `path`."""
    from fomoe_ext.config.io import save_config
    from fomoe_ext.config.job import preset_config

    base, large = preset_config("tiny"), device == "cuda"
    model = dataclasses.replace(
        base.model,
        hidden_size=512 if large else 32,
        intermediate_size=512 if large else 16,
        num_layers=4 if large else 2,
        num_heads=4 if large else 2,
        seq_len=256 if large else 32,
        router_scope="global",
    )
    run = dataclasses.replace(
        base.run,
        rounds=ROUNDS,
        checkpoint_rounds=SAVED,
        eval_rounds=0,
        eval_tokens=8192 if large else 256,
        tensorboard=False,
        device=device,
        dtype="bfloat16" if large else "float32",
        run_dir=folder,
        resume=resume,
    )
    sources = (str(ROOT / "fomoe_ext" / "*.py"),)
    config = dataclasses.replace(
        base,
        model=model,
        run=run,
        data=dataclasses.replace(base.data, data=sources, cache_dir=path.parent / "cache"),
        sites=dataclasses.replace(base.sites, sites=2, replication=1),
        inner=dataclasses.replace(base.inner, batch_size=16 if large else 2),
    )
    save_config(config, path)
    return path


def site(config: Path) -> int:
    """Runs a site in this process, without the command line."""
    if not installed("rich"):
        sys.modules.update({name: MagicMock() for name in RICH})
    from fomoe_ext.config.io import load_config
    from fomoe_ext.launch.world import StopRequest, find_world
    from fomoe_ext.train import process as train

    loaded = load_config(config)
    return train.run_site(loaded, find_world(loaded.sites.sites), StopRequest())


def launch(config: Path, run: Path, resume: str | None) -> int:
    """Runs `fomoe train`, or the same without tyro and rich; returns the exit code."""
    if installed("tyro") and installed("rich"):
        more = ["--run-dir", str(run), *(["--resume", resume] if resume else [])]
        command = [sys.executable, "-m", "fomoe_ext.cli", "train", "--config", str(config), *more]
        return subprocess.run(command, check=False).returncode
    from fomoe_ext.launch.processes import run_sites

    words = [sys.executable, "-m", "bench.gpu.job", SITE, str(config)]
    return run_sites(words, 2, run / "logs")


def read_run(folder: Path) -> dict[str, Any]:
    """Losses of the rounds, seconds of their meetings and more, from the run's files."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if "meeting_s" in line]
    final = json.loads((folder / "report.json").read_text())
    return {
        "losses": [line["loss"] for line in rounds],
        "rounds": [line["round"] for line in rounds],
        "meeting_seconds": [line["meeting_s"] for line in rounds],
        "tokens_per_second": [line["tokens_per_s"] for line in rounds],
        "resumed": [line["round"] for line in lines if line["kind"] == "resumed"],
        "report": final,
    }


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[float]:
    """Differences of the losses of both runs, for the rounds after the resume."""
    of = dict(zip(first["rounds"], first["losses"], strict=True))
    begin = max(second["resumed"], default=ROUNDS)
    pairs = zip(second["rounds"], second["losses"], strict=True)
    return [abs(of[number] - loss) for number, loss in pairs if number > begin]


def run_job(folder: Path, device: str) -> tuple[dict[str, Any], str]:
    """Runs the job and resumes it. Returns the results, and what is wrong with them or ""."""
    first, second = folder / "first", folder / "second"
    start = time.monotonic()
    code = launch(write_config(folder / "first.toml", first, device), first, None)
    if code:
        return {"exit_code": code}, f"two sites on {device}: exit code {code}"
    middle = time.monotonic()
    saved = sorted((first / "checkpoints").glob("step-*"))
    found: dict[str, Any] = {"seconds": middle - start, "checkpoints": [p.name for p in saved]}
    if len(saved) < 2:
        return found, f"checkpoints must be 2, got {len(saved)}"
    # A resumed job continues in the folder of its checkpoint. It gets a copy without later ones.
    shutil.copytree(first, second)
    for later in saved[1:]:
        shutil.rmtree(second / "checkpoints" / later.name)
    named = str(second / "checkpoints" / saved[0].name)
    code = launch(write_config(folder / "second.toml", second, device, named), second, named)
    found["resumed_seconds"] = time.monotonic() - middle
    if code:
        return found, f"resumed from {saved[0].name}: exit code {code}"
    found |= {"first": read_run(first), "second": read_run(second)}
    apart = differences(found["first"], found["second"])
    found["largest_difference"] = max(apart, default=None)
    losses = found["first"]["losses"]
    if len(losses) < ROUNDS or len(apart) != ROUNDS - SAVED:
        return (
            found,
            f"rounds must be {ROUNDS}, and {ROUNDS - SAVED} after the resume, "
            f"got {len(losses)} and {len(apart)}",
        )
    if not losses[-1] < losses[0]:
        return found, f"the loss must fall, got {losses[0]:.3f} to {losses[-1]:.3f}"
    # On a GPU torch does some sums in no fixed order.
    if max(apart) > (0.1 if device == "cuda" else 0.0):
        return found, f"losses after the resume differ by {max(apart):.3f}"
    return found, ""


def main() -> int:
    if sys.argv[1:2] == [SITE]:
        return site(Path(sys.argv[2]))
    given = measured.arguments(__doc__)
    results = Results(given.out, given.budget)
    with tempfile.TemporaryDirectory(prefix="fomoe-gpu-job-") as folder:
        found, wrong = run_job(Path(folder), given.device)
        for log in sorted(Path(folder).glob("*/logs/*.log")) if wrong else []:
            print(f"{log}:\n{log.read_text(errors='replace')[-2000:]}")
    results.add("job", found)
    if wrong:
        print(wrong)
        return 1
    losses = found["first"]["losses"]
    print(
        f"{len(losses)} rounds of two sites, loss {losses[0]:.2f} to {losses[-1]:.2f}; from the "
        f"checkpoint again, at most {found['largest_difference']:.1e} apart"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
