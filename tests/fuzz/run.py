"""Tries very many inputs on every parser: `python -m tests.fuzz.run --inputs 1000000`.

Inputs are valid ones, damaged at random (`mutate.py`). With `--engine atheris` they are guided by
coverage (`pip install atheris`). Input `number` of a parser depends on the seed alone: `--parser
NAME --first NUMBER --inputs 1` repeats it. Exits 1 if a parser raises an error that it does not
document, hangs, or leaks memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .limits import Hang, within
from .parsers import Parser, parsers

SECONDS = 5.0
"""A parser that takes longer for one input, of processor time, hangs."""
_MB_KEPT = 64.0
"""A parser that keeps more memory than that over a run leaks."""
_WARM_UP = 1000
"""Inputs before memory is measured: caches fill."""
_MOST_SHOWN = 5


@dataclass
class Outcome:
    """How many inputs of a parser were tried, taken and failed; the first errors as texts."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    mb_kept: float = 0.0
    errors: int = 0
    texts: list[str] = field(default_factory=list)

    def note(self, raw: bytes, number: int) -> None:
        """Records the undocumented error that is being handled."""
        self.errors += 1
        if len(self.texts) < _MOST_SHOWN:
            lines = traceback.format_exc().splitlines()
            self.texts.append(f"input {number}: {raw[:400]!r}\n  " + "\n  ".join(lines[-8:]))

    @property
    def good(self) -> bool:
        """Whether nothing went wrong."""
        return not self.errors and self.mb_kept <= _MB_KEPT


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Trial:
    """A parser under inputs."""

    def __init__(self, parser: Parser) -> None:
        self.parser, self.outcome = parser, Outcome()
        self._before: float | None = None
        self._started = time.perf_counter()

    def try_one(self, raw: bytes, number: int) -> None:
        """One input."""
        outcome = self.outcome
        if outcome.inputs == _WARM_UP:
            self._before = _resident_mb()
        outcome.inputs += 1
        try:
            with within(SECONDS):
                if self.parser.accepts(raw):
                    outcome.accepted += 1
                else:
                    outcome.refused += 1
        except (Exception, Hang):
            outcome.note(raw, number)

    def end(self) -> Outcome:
        """What became of all of them."""
        self.outcome.seconds = time.perf_counter() - self._started
        if self._before is not None:
            self.outcome.mb_kept = _resident_mb() - self._before
        return self.outcome


def numbered(parser: Parser, seed: int, number: int) -> bytes:
    """An input by its number."""
    return parser.damaged(random.Random(f"{seed} {parser.name} {number}"))


def at_random(parser: Parser, seed: int, numbers: Iterable[int]) -> Outcome:
    """Tries the inputs of these numbers."""
    trial = Trial(parser)
    for number in numbers:
        trial.try_one(numbered(parser, seed, number), number)
    return trial.end()


def _in_a_process(parser: Parser, seed: int, count: int) -> Outcome:
    """Tries what atheris makes (`guided.py`), in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "outcome.json"
        words = [f"{__package__}.guided", parser.name, str(seed), str(count), str(answer)]
        done = subprocess.run([sys.executable, "-m", *words], stderr=subprocess.PIPE)
        if answer.is_file():
            return Outcome(**json.loads(answer.read_text(encoding="utf-8")))
    tail = done.stderr.decode(errors="replace").splitlines()[-20:]
    return Outcome(errors=1, texts=[f"ended with {done.returncode}\n  " + "\n  ".join(tail)])


def shares(chosen: Sequence[Parser], inputs: int) -> list[int]:
    """How many of the inputs each parser gets: at least as many as its share says."""
    whole = sum(parser.share for parser in chosen)
    return [math.ceil(inputs * parser.share / whole) for parser in chosen]


def _row(name: str, outcome: Outcome) -> str:
    return (
        f"{name:<26} {outcome.inputs:>9} {outcome.accepted:>9} {outcome.refused:>9} "
        f"{outcome.errors:>7} {outcome.seconds:>8.1f} {outcome.mb_kept:>8.1f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs; returns the exit code."""
    parse = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parse.add_argument("--inputs", type=int, default=1_000_000, help="of all parsers together")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--engine", choices=("random", "atheris"), default="random")
    parse.add_argument("--parser", choices=list(parsers()), help="only this one")
    parse.add_argument("--first", type=int, default=0, help="number of the first input")
    given = parse.parse_args(arguments)
    chosen = [p for p in parsers().values() if given.parser in (None, p.name)]
    print(f"{'parser':<26}    inputs  accepted   refused  errors  seconds  MB kept")
    total, good = Outcome(), True
    for parser, count in zip(chosen, shares(chosen, given.inputs), strict=True):
        if given.engine == "atheris":
            outcome = _in_a_process(parser, given.seed, count)
        else:
            outcome = at_random(parser, given.seed, range(given.first, given.first + count))
        good &= outcome.good
        print(_row(parser.name, outcome), flush=True)
        for text in outcome.texts:
            print(f"  {text}", flush=True)
        for name in ("inputs", "accepted", "refused", "errors", "seconds", "mb_kept"):
            setattr(total, name, getattr(total, name) + getattr(outcome, name))
    print(_row("all", total))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
