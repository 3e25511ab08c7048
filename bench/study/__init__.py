"""The study behind `docs/claims.md`: the FoMoE paper's claims at a size that two cores train.

`python -m bench.study all` in the root of the repository; `--help` says what else.
"""

import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[2])
if sys.path and Path(sys.path[0] or ".").resolve() == Path(_ROOT):
    # `python -m` puts the source tree first: an installed fomoe_ext, with its kernels, is to be
    # found before it.
    del sys.path[0]
    sys.path.append(_ROOT)
