"""Which site holds which expert, and how many bytes it sends: plain arithmetic, without torch.

Placements and the designs and searches that make them, experts that are averaged in turns, frozen
copies, experts spread over the ranks of a site, bytes on the wire. May import checks; knows no
file, tensor, process or job.
"""

from fomoe_ext.placement.placement import Placement

__all__ = ["Placement"]
