"""Runs a command once per site over an emulated slow link (`fomoe_ext.launch.link`). No torch.

    python -m fomoe_ext.link --sites 2 --link 200mbit,50ms -- command...

Each of the processes has the environment variables of a site.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fomoe_ext.config.links import parse_link
from fomoe_ext.files.outputs import require_folder
from fomoe_ext.launch.console import outlive_terminal
from fomoe_ext.launch.logs import shown
from fomoe_ext.launch.processes import run_sites


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command once per site; returns an exit code as `fomoe train` does."""
    parser = argparse.ArgumentParser(
        prog="python -m fomoe_ext.link",
        description="Run a command once per site over an emulated slow link.",
    )
    parser.add_argument("--sites", type=int, default=2, help="number of sites (default: 2)")
    parser.add_argument(
        "--link", help="bandwidth and latency, such as 200mbit,50ms (default: no limit)"
    )
    parser.add_argument(
        "--log-dir", type=Path, help="folder for the output of all sites except the first"
    )
    parser.add_argument("command", nargs="+", help="after --: the command and its arguments")
    given = parser.parse_args(arguments)
    outlive_terminal()
    try:
        link = None if given.link is None else parse_link(given.link)
        if given.log_dir is not None:
            require_folder("--log-dir", given.log_dir)
        with shown():
            return run_sites(given.command, given.sites, given.log_dir, link)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
