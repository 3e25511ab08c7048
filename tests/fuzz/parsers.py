"""Every parser of what comes from disk or wire, with valid inputs and the errors it may raise."""

from __future__ import annotations

from functools import lru_cache

from .checkpoints import checkpoint_parsers, state_parser, tensor_file_parsers
from .files import file_parsers
from .parser import Parser
from .wire_format import wire_parsers


@lru_cache(maxsize=1)
def parsers() -> dict[str, Parser]:
    """All parsers by name; makes the files that they need, once per process."""
    found = [
        *wire_parsers(),
        *file_parsers(),
        *checkpoint_parsers(),
        *tensor_file_parsers(),
        state_parser(),
    ]
    return {parser.name: parser for parser in found}
