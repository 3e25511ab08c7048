"""Python processes that tests start with a script of their own."""

from __future__ import annotations

import os
import sys


def environment(**changes: str) -> dict[str, str]:
    """With which a new process imports what this one does: the package, helpers, test modules."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **changes}
