"""Any command, once per site, on a slow link (`fomoe_ext.launch.link`). Needs no torch.

    python -m fomoe_ext.link --sites 2 --link 200mbit,50ms -- command...

runs it with the environment of a site.
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
    """Runs a command per site on a link; returns the exit code as `fomoe train` does."""
    parser = argparse.ArgumentParser(
        prog="python -m fomoe_ext.link", description="Run a command once per site on a slow link."
    )
    parser.add_argument("--sites", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--link", help="such as 200mbit,50ms (default: no shaping)")
    parser.add_argument(
        "--log-dir", type=Path, help="folder for the output of the sites but the first"
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
