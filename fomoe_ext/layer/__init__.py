"""The Mixture-of-Experts layer of one site, MoELayer: route, compute, combine, measure, balance.

May import ops, placement, launch (messages between processes), activations and checks. Knows one
site only: not how sites meet, and not which model or job it is part of.

    the layer        moe; its parts router, compute, balance (statistics and losses), skipped (the
                     weight of skipped slots), inputs (checks of x), arguments (what repr shows)
    the experts      experts, residents (which ones are here), shared, stale (frozen copies); their
                     initial weights: seeding, upcycle
    several ranks    mesh (the ranks of a site), dispatch (rows travel to the rank that holds their
                     expert), dense (FSDP for everything else)
    whole models     assemble (the global model from the parts of all sites; in this folder because
                     outer, checkpoint and hf use it), routing_probe (how stable routing is)
"""

from fomoe_ext.layer.experts import Experts
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.layer.router import Router
from fomoe_ext.layer.shared import SharedExpert

__all__ = ["Experts", "MoELayer", "Router", "SharedExpert"]
