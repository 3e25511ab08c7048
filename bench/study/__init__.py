"""The study behind `docs/claims.md`: the FoMoE paper's claims at a size that two cores train.

`python -m bench.study all` in the root of the repository; `--help` says what else.
"""

import os
import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parents[2]:
    # `python -m` puts the source tree first, here and in the processes that are forked: an
    # installed fomoe_ext, with its kernels, is to be found before it.
    sys.path.append(sys.path.pop(0))
    os.environ["PYTHONSAFEPATH"] = "1"
