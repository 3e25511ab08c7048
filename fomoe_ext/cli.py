"""The `fomoe` command. Needs no torch until a command does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

from fomoe_ext.extras import NotInstalled
from fomoe_ext.files.outputs import named, options_of
from fomoe_ext.launch import signals
from fomoe_ext.launch.console import write_any_character
from fomoe_ext.launch.logs import shown
from fomoe_ext.launch.reader import EXIT_UNREAD, ended_by_reader
from fomoe_ext.version import VERSION

_USAGE = """usage: fomoe COMMAND [flags]

commands:
  plan        what a job costs: bytes, memory, FLOPs and seconds per round and site
  train       train a language model across sites, by default four on this machine
  report      the report of a finished run again, as one HTML page, or of several runs side by side
  eval        validation loss of a run, an exported folder or a transformers model; cost of skipping
  export      one model folder of a run's experts, for transformers or as plain safetensors
  lighthouse  keep the list of the sites of a job on several machines, where sites come and go
  info        what this build is, what this machine has, which kernels would run

`fomoe COMMAND --help` shows a command's flags, `fomoe --version` the version."""


def train(arguments: Sequence[str]) -> int:
    """`fomoe train`: one process per site on this machine; returns the exit code."""
    from fomoe_ext.train.command import main as train_main

    return train_main(arguments)


def plan(arguments: Sequence[str]) -> int:
    """`fomoe plan`: the cost model of a job; returns the exit code."""
    from fomoe_ext.plan.command import main as plan_main

    return plan_main(arguments)


def report(arguments: Sequence[str]) -> int:
    """`fomoe report`: the report of a run from its folder; returns the exit code."""
    from fomoe_ext.report.command import main as report_main

    return report_main(arguments)


def export(arguments: Sequence[str]) -> int:
    """`fomoe export`: a run's global model as one folder; returns the exit code."""
    from fomoe_ext.export.command import main as export_main

    return export_main(arguments)


def evaluate(arguments: Sequence[str]) -> int:
    """`fomoe eval`: validation loss of a model; returns the exit code."""
    from fomoe_ext.eval.command import main as eval_main

    return eval_main(arguments)


def lighthouse(arguments: Sequence[str]) -> int:
    """`fomoe lighthouse`: keeps the list of a job's sites; returns the exit code."""
    from fomoe_ext.fault.lighthouse import main as lighthouse_main

    return lighthouse_main(arguments)


def info(arguments: Sequence[str]) -> int:
    """`fomoe info`: build, machine and kernels; returns the exit code."""
    from fomoe_ext.info import main as info_main

    return info_main(arguments)


_COMMANDS = {
    "train": train,
    "plan": plan,
    "report": report,
    "export": export,
    "eval": evaluate,
    "info": info,
    "lighthouse": lighthouse,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `fomoe COMMAND [flags]` and returns its exit code: 2, with a line on stderr, for bad
    arguments."""
    write_any_character()
    args = list(sys.argv[1:] if arguments is None else arguments)
    name = f"fomoe {args[0]}" if args and args[0] in _COMMANDS else "fomoe"
    try:
        with signals.interrupting(), ended_by_reader(), shown():
            return _run(args)
    except signals.Interrupted as stop:
        if stop.exit_code != EXIT_UNREAD:  # of which nobody wants to read
            _complain(f"{name}: ended by {stop.name}")
        return stop.exit_code
    except (ValueError, TypeError, OSError, NotInstalled) as error:
        _complain(f"{name}: {named(error, options_of(args[1:]))}")
        return 2
    except ImportError as error:
        if not str(error).startswith("fomoe_ext: "):  # ours: the package is not built
            raise
        _complain(f"{name}: {error}")
        return 1


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_USAGE)
        return 0 if args else 2
    if args[0] == "--version":
        print(VERSION)
        return 0
    command = _COMMANDS.get(args[0])
    if command is None:
        _complain(f"fomoe: unknown command {args[0]!r}\n\n{_USAGE}")
        return 2
    return command(args[1:])


def _complain(text: str) -> None:
    with suppress(BrokenPipeError):  # `2>&1 | head`
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
