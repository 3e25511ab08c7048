"""Inputs that atheris makes for one parser: `run --engine atheris` starts this, a process each.

Only this package and the text parsers that it uses are instrumented, at import: instrumenting torch
would take longer than fuzzing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["fomoe_ext", "json", "tomllib"], enable_loader_override=False
):
    from .parsers import parsers
    from .run import Trial


def main() -> None:
    """Tries so many inputs, writes the outcome to a file and ends the process."""
    parse = argparse.ArgumentParser()
    for name, kind in (("parser", str), ("seed", int), ("inputs", int), ("answer", Path)):
        parse.add_argument(name, type=kind)
    given = parse.parse_args()
    trial = Trial(parsers()[given.parser])

    def one(raw: bytes) -> None:
        trial.try_one(bytes(raw), trial.outcome.inputs)
        if trial.outcome.inputs >= given.inputs:
            given.answer.write_text(json.dumps(asdict(trial.end())), encoding="utf-8")
            os._exit(0)

    with tempfile.TemporaryDirectory() as folder:
        for i, raw in enumerate(trial.parser.corpus):
            (Path(folder) / str(i)).write_bytes(raw)
        atheris.Setup([sys.argv[0], folder, f"-seed={given.seed + 1}", "-verbosity=0"], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
