"""The Mixture-of-Experts layer of one site, MoELayer: route, compute, combine, measure, balance.

May import ops, placement, launch (how processes speak) and checks. Knows one site alone: neither
how sites meet nor what model or job it is part of.

    the layer        moe, of router, compute, balance (measured, and losses), skipped, inputs
    the experts      experts, residents (which are here), shared, stale (frozen copies); seeding and
                     upcycle: their first weights
    several ranks    mesh (who is who), dispatch (rows to who holds their experts), dense (FSDP)
    whole models     assemble (one of all sites' parts; here, as outer, checkpoint and hf use it),
                     routing_probe (how stable routing is)
"""

from fomoe_ext.layer.experts import Experts
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.layer.router import Router
from fomoe_ext.layer.shared import SharedExpert

__all__ = ["Experts", "MoELayer", "Router", "SharedExpert"]
