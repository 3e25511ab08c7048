"""Packages that only some features need, and what is said where one is missing."""

from __future__ import annotations


class NotInstalled(RuntimeError):
    """A package that a feature needs cannot be imported; the message says how to get it."""

    def __init__(
        self, what: str, package: str, extra: str = "", reason: ImportError | None = None
    ) -> None:
        """`what` needs `package`, of this package's `extra`. `reason`: what importing it raised."""
        text = f"{what} needs {package}: pip install {package}"
        text += f", or 'fomoe-ext[{extra}]'" if extra else ""
        if reason is not None and not isinstance(reason, ModuleNotFoundError):
            text += f" (it is there, but cannot be imported: {reason})"  # broken, not missing
        super().__init__(text)
