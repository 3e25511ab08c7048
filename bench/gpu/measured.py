"""Shared by the steps that measure: arguments, sizes, results.

Each result is written at once as a line of JSON, so that a step that is killed leaves those it has.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import expert_work as work
import torch
from expert_work import Model

ROUNDS = {"cuda": 5, "cpu": 1}  # of interleaved measurements
WRONG = 2e-2  # relative error from which on a result in bf16 is another one
# With a stand-in for the GPU the same is done on the CPU, small.
SMALL_MODELS = (
    Model("gated", 32, 16, 8, 2),
    Model("biases", 24, 40, 8, 2, "clamped_swiglu", bias=True),
    Model("plain", 32, 8, 16, 4, "silu"),
)


@dataclass(frozen=True)
class Case:
    """A model, tokens and a routing."""

    model: Model
    tokens: int
    routing: str

    def __str__(self) -> str:
        return f"{self.model.name} {self.tokens} {self.routing}"


def models_of(device: str) -> Sequence[Model]:
    return work.MODELS if device == "cuda" else SMALL_MODELS


def cases_of(device: str) -> list[Case]:
    """All cases, the most important first."""
    tokens = (16384, 4096) if device == "cuda" else (96, 48)
    large, small = tokens
    orders = [(large, "balanced"), (small, "zipf"), (large, "zipf"), (small, "balanced")]
    if device == "cpu":
        orders = orders[:2]
    return [Case(model, *order) for order in orders for model in models_of(device)]


class Results:
    """Writes results, and knows how much time the step has left."""

    def __init__(self, path: Path, budget: float) -> None:
        self.path, self.budget = path, budget
        self.began = time.monotonic()
        self.wrong: list[str] = []
        self.missed: list[str] = []

    @property
    def left(self) -> float:
        """Seconds left of the budget."""
        return self.budget - (time.monotonic() - self.began)

    def add(self, name: str, result: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"name": name, "extra_info": result}) + "\n")

    def check(self, what: str, error: float) -> None:
        """Records a result as wrong if its error is larger than rounding explains."""
        if not error < WRONG:
            self.wrong.append(f"{what} ({error:.1e})")

    @contextmanager
    def guarded(self, what: object) -> Iterator[None]:
        """Records an exception raised inside, so that the step continues with the next case.

        Raises SystemExit if the GPU itself no longer works.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            self.missed.append(f"{what}: out of memory")
        except Exception as error:
            traceback.print_exc()
            self.wrong.append(f"{what}: {type(error).__name__}: {error}"[:200])
            if torch.cuda.is_available():
                try:
                    torch.cuda.synchronize()
                except RuntimeError as broken:  # a sticky CUDA error: nothing can run any more
                    raise SystemExit(f"{what}: {broken}"[:400]) from error

    def enough(self, what: object, seconds: float = 2.0) -> bool:
        """Whether so much time is left; cases without are listed at the end."""
        if self.left < seconds:
            self.missed.append(str(what))
            return False
        return True

    def finish(self, done: str) -> int:
        """Prints a line about the results; returns the exit code."""
        missed = f", not reached: {len(self.missed)} ({self.missed[0]} ...)" if self.missed else ""
        wrong = f", WRONG: {', '.join(self.wrong)}" if self.wrong else ""
        print(f"{done}{wrong}{missed}", flush=True)
        return 1 if self.wrong else 0


def arguments(description: str | None, *flags: str) -> argparse.Namespace:
    """Parses the arguments of a step's process; `flags` are switches."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, required=True, help="file to append results to")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds to measure for")
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()


def release_memory() -> None:
    """Frees unused GPU memory, so that other processes can use it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Turn:
    """The turn of a step that prepares itself: the runner then writes a line to its standard input.

    A step that runs without the runner prepares for as long as it takes.
    """

    def __init__(self, waits: bool) -> None:
        self._waits, self._at, self._came = waits, 0.0, threading.Event()
        if waits:
            threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        sys.stdin.readline()
        self._at = time.monotonic()
        self._came.set()

    @property
    def here(self) -> bool:
        return self._came.is_set()

    def wait(self) -> float:
        """Waits for the turn. Returns its time by time.monotonic; without a runner, now."""
        print("prepared", flush=True)
        if not self._waits:
            return time.monotonic()
        self._came.wait()
        return self._at
