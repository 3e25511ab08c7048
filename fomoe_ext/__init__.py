"""FoMoE: Mixture-of-Experts training across weakly connected sites.

Importing the package alone is cheap and needs no torch: the public names below are imported when
they are first used. `import fomoe_ext.ops` makes the native ops (`torch.ops.fomoe.*`) known to
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fomoe_ext.version import VERSION as __version__

if TYPE_CHECKING:
    from fomoe_ext.config.model import ModelConfig
    from fomoe_ext.layer.experts import Experts
    from fomoe_ext.layer.mesh import make_mesh
    from fomoe_ext.layer.moe import MoELayer
    from fomoe_ext.layer.router import Router
    from fomoe_ext.model.language import LanguageModel
    from fomoe_ext.outer.errors import MeetingError, MeetingLost
    from fomoe_ext.outer.options import OuterOptions
    from fomoe_ext.outer.reports import RoundReport
    from fomoe_ext.outer.sync import OuterSync
    from fomoe_ext.placement.placement import Placement

__all__ = [
    "Experts",
    "LanguageModel",
    "MeetingError",
    "MeetingLost",
    "MoELayer",
    "ModelConfig",
    "OuterOptions",
    "OuterSync",
    "Placement",
    "RoundReport",
    "Router",
    "__version__",
    "make_mesh",
]

_HOME_OF = {
    "Experts": "fomoe_ext.layer.experts",
    "LanguageModel": "fomoe_ext.model.language",
    "MeetingError": "fomoe_ext.outer.errors",
    "MeetingLost": "fomoe_ext.outer.errors",
    "MoELayer": "fomoe_ext.layer.moe",
    "ModelConfig": "fomoe_ext.config.model",
    "OuterOptions": "fomoe_ext.outer.options",
    "OuterSync": "fomoe_ext.outer.sync",
    "Placement": "fomoe_ext.placement.placement",
    "RoundReport": "fomoe_ext.outer.reports",
    "Router": "fomoe_ext.layer.router",
    "make_mesh": "fomoe_ext.layer.mesh",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fomoe_ext' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME_OF))
