"""The Mixture-of-Experts layer of one site, MoELayer: route, compute, combine, measure, balance.

Of a site of several ranks: mesh (who is who), dispatch (rows to the ranks that hold their experts)
and dense (all other parameters, by FSDP). Of models of such layers: assemble (one model of all
sites' parts; here, as outer, checkpoint and hf use it) and routing_probe (how stable routing is).
May import ops, placement and launch (how processes speak). Knows one site alone: neither how sites
meet nor what model or job it is part of.
"""

from fomoe_ext.layer.experts import Experts
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.layer.router import Router
from fomoe_ext.layer.shared import SharedExpert

__all__ = ["Experts", "MoELayer", "Router", "SharedExpert"]
