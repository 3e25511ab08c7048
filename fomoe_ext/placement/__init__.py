"""Who holds which expert, and what travels for it: plain arithmetic, without torch.

Placements and the tables and searches that make them, experts in turns, frozen copies, hot experts
spread over ranks, bytes on the wire. May import checks; knows no file, tensor, process or job.
"""

from fomoe_ext.placement.placement import Placement

__all__ = ["Placement"]
