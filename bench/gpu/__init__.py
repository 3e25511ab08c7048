"""What wants a GPU, in one go: `python -m bench.gpu FOLDER` (.ci/gpu).

steps.py is the table of what runs, runner.py runs it, summary.py says what came out. The other
modules are what the steps run, a process each; measured.py is what these share.
"""

import sys
from pathlib import Path

# The benchmarks of bench/ import each other by their bare names.
_BENCH = str(Path(__file__).resolve().parents[1])
if _BENCH not in sys.path:
    sys.path.append(_BENCH)
