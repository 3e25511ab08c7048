"""`python -m tests.chaos.soak --minutes 15` runs jobs with random faults until the time is up.

It prints what happened in each job and, at the end, a table of the faults. For a job that fails it
prints the seed and the faults, with which it can be repeated; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from chaos_jobs import NUM_SITES, Outcome, run

from fomoe_ext.files.atomic import write_text
from fomoe_ext.launch.inject import Fault
from fomoe_ext.report.story import describe

ROUNDS = 16
PHASES = ("local", "notes", "encode", "reduce", "gather", "apply", "reform", "checkpoint")
KINDS = {"kill": 5, "stop": 2, "cut": 2, "slow": 1, "corrupt": 2, "full": 1}


def draw_script(random_: random.Random) -> list[Fault]:
    """Draws one to three faults, at different sites and in different rounds."""
    count = random_.choice((1, 1, 2, 3))
    rounds = sorted(random_.sample(range(2, ROUNDS - 3), count))
    sites = random_.sample(range(NUM_SITES), count)
    faults = []
    for site, round_ in zip(sites, rounds, strict=True):
        kind = random_.choices(list(KINDS), list(KINDS.values()))[0]
        phase = random_.choice(PHASES)
        if kind in ("corrupt", "full"):
            phase = "reduce" if kind == "corrupt" else "checkpoint"
        lasting = {"stop": random_.uniform(2.5, 9.0), "slow": random_.uniform(1.0, 9.0)}
        faults.append(Fault(kind, site, round_, phase, round(lasting.get(kind, 3600.0), 1)))
    return faults


def problems(outcome: Outcome, faults: Sequence[Fault], replication: int) -> list[str]:
    """What is wrong with a job that should have survived its faults."""
    if outcome.report is None:
        return ["the report is missing"]
    found = []
    run_ = outcome.report["run"]
    if run_["rounds"] != ROUNDS:
        found.append(f"rounds must be {ROUNDS}, got {run_['rounds']}")
    if outcome.left:
        found.append(f"processes left behind: {outcome.left}")
    for site in outcome.report["sites"]:
        sent, planned = site["bytes_sent"], site["planned"]["bytes"]
        if sent != planned:
            found.append(f"bytes sent by site {site['site']} must be {planned}, got {sent}")
    restored = [(event, entry) for event in outcome.story for entry in event["restored"]]
    for event, entry in restored:
        if replication > 1 and len(faults) == 1:
            found.append(f"one fault took all holders of an expert: {entry}")
        if replication == 1 and len(event["lost"]) == 1:
            at = entry["from_step"]
            if at is None or event["step"] - at > run_["local_steps"]:
                found.append(f"more than a round of an expert was lost: {entry} at {event['step']}")
    if not outcome.loss < 3.0:  # 5.5 at the start
        found.append(f"loss must be below 3, got {outcome.loss}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 when all jobs survived, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="seed of the first job; later ones count up")
    parser.add_argument("--write", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--keep", type=Path, help="folder for the logs of jobs that fail")
    given = parser.parse_args(arguments)
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(10**6)
    deadline, failed, losses = time.monotonic() + 60 * given.minutes, [], []
    first, jobs, recoveries = seed, 0, []
    happened: Counter[tuple[str, str, int]] = Counter()
    while time.monotonic() < deadline:
        jobs += 1
        random_ = random.Random(seed)
        replication, faults = random_.choice((1, 2)), draw_script(random_)
        script = ", ".join(map(str, faults))
        more = ["--replication", str(replication), "--rounds", str(ROUNDS)]
        more += ["--checkpoint-rounds", "2"] + (["--shadow-experts"] if replication == 1 else [])
        with tempfile.TemporaryDirectory(prefix="fomoe-soak-") as folder:
            try:
                outcome = run(Path(folder), more, script, restarts=2)
                wrong = problems(outcome, faults, replication)
                log = outcome.log
            except AssertionError as error:
                outcome, wrong, log = None, ["the job did not end"], str(error)
        print(f"seed {seed}, replication {replication}: {script}", flush=True)
        if outcome is not None and outcome.report is not None:
            losses.append(outcome.loss)
            recoveries += [event["seconds"] for event in outcome.story if event["lost"]]
            for event in outcome.story:
                print(f"  {describe(event)}")
            print(f"  loss {outcome.loss:.4f}, {outcome.seconds:.0f} s", flush=True)
        for fault in faults:
            happened[fault.kind, fault.phase, replication] += 1
        if wrong:
            failed.append(seed)
            print(f"  FAILED: {'; '.join(wrong)}", flush=True)
            if given.keep:
                given.keep.mkdir(parents=True, exist_ok=True)
                (given.keep / f"seed-{seed}.log").write_text(f"{script}\n{wrong}\n{log}")
        seed += 1
    spread = f", loss {min(losses):.3f} to {max(losses):.3f}" if losses else ""
    summary = [
        f"{jobs} jobs of {NUM_SITES} sites and {ROUNDS} rounds in {given.minutes:g} minutes, "
        f"{sum(happened.values())} faults, {len(losses)} jobs ended{spread}; "
        + (
            f"failed: seeds {failed}"
            if failed
            else "all survived and sent exactly as many bytes as planned"
        ),
        "Seconds from the loss of a site until training continued: median "
        f"{_median(recoveries):.1f}, longest {max(recoveries, default=0.0):.1f}, "
        f"over {len(recoveries)} recoveries",
    ]
    text = "\n".join([*_table(happened), "", *(f"{line}." for line in summary)])
    print(f"\n{text}")
    if given.write:
        command = f"python -m tests.chaos.soak --minutes {given.minutes:g} --seed {first}"
        intro = (
            "Random faults were injected into training jobs of real processes. The table counts "
        )
        intro += f"them by kind, phase of the round, and replication. `{command}` writes this page."
        write_text(given.write, f"# Faults survived\n\n{intro}\n\n{text}\n")
    return 1 if failed else 0


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _table(happened: Counter[tuple[str, str, int]]) -> list[str]:
    lines = ["| fault | phase | replication 1 | replication 2 |", "|---|---|---:|---:|"]
    for kind, phase in sorted({key[:2] for key in happened}):
        counts = f"{happened[kind, phase, 1]} | {happened[kind, phase, 2]}"
        lines.append(f"| {kind} | {phase} | {counts} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
