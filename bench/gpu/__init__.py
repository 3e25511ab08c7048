"""Runs all tests and measurements that need a GPU: `python -m bench.gpu FOLDER` (.ci/gpu).

steps.py lists the steps, runner.py runs them, summary.py prints the results. The other modules are
the programs that the steps run, each in its own process; measured.py is shared by these.
"""

import sys
from pathlib import Path

# The modules of bench/ import each other without a package name.
_BENCH = str(Path(__file__).resolve().parents[1])
if _BENCH not in sys.path:
    sys.path.append(_BENCH)
