"""Damaged and hostile inputs for every parser of what comes from disk or wire.

`parsers.py` names them, `mutate.py` damages valid inputs; `test_parsers.py` tries some hundred of
each in the suite, `python -m tests.fuzz.run` as many as one likes.
"""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parents[2]:
    # `python -m` puts the source tree before an installed fomoe_ext, with its kernels.
    sys.path.append(sys.path.pop(0))
