"""Keeps torch.compile from using what it has compiled with another version of the ops.

torch stores compiled graphs on disk, backward passes with them, under a key of the graph that was
traced. The gradient of an op is not part of that graph, so code of another version would be found,
and call an op with arguments that it no longer has.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.compiler.config as compiler


def _version() -> str:
    """Changes with the schema of an op and with the source of the gradients."""
    found = hashlib.sha256()
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fomoe::"))
    for name in names:
        found.update(str(torch._C._get_schema(*([*name.split("."), ""])[:2])).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def tag_caches() -> None:
    """Adds the version of the ops to the key of all that torch.compile stores, and keeps what the
    user has set as `torch.compiler.config.cache_key_tag`."""
    tag = f"fomoe_ext-{_version()}"
    if tag not in compiler.cache_key_tag:
        compiler.cache_key_tag += tag
