"""The Mixture-of-Experts layer of one site, and a site of several ranks: mesh, dispatch, dense.

May import ops, placement and launch (how processes speak). Knows one site alone: neither how sites
meet nor what model or job it is part of.
"""

from fomoe_ext.layer.moe import Experts, MoELayer, Router

__all__ = ["Experts", "MoELayer", "Router"]
