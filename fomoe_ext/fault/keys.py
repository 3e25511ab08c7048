"""The keys of the store beside the lighthouse: for each, who writes it and its value.

All are below `root()`, so that a run sees only its own. `site` is a site's permanent number, `view`
a view's name (`membership.View`).
"""

from __future__ import annotations

from fomoe_ext.fault.secret import keyed

LIGHTHOUSE_PORT = "lighthouse"
"""Written by the lighthouse: the port of torchft's server, in digits."""
CURRENT = "current"
"""Written by every site of a view, all equal: the current view, as JSON of name and members."""
FINISHED = "finished"
"""Written by sites that have reached the end of the job: 1."""


def root() -> str:
    """The prefix of all keys of the run; it depends on the secret."""
    return keyed("store")


def of_view(view: str) -> str:
    """The prefix for torch.distributed's own keys of a view's process groups."""
    return f"view/{keyed('view', view)}"


# ------------------------------------------------------------------------------------- of one site


def start(site: int) -> str:
    """Written by the site when a job begins, before it waits for the others: 1."""
    return f"start/{site}"


def beat(site: int) -> str:
    """Written by the site twice a second: its incarnation and a counter, separated by a dot."""
    return f"beat/{site}"


def incarnation(site: int) -> str:
    """Incremented once by each process of the site: the number of processes so far."""
    return f"incarnation/{site}"


def knock(site: int) -> str:
    """Written by a site that asks to join, until it is taken in: its incarnation."""
    return f"knock/{site}"


def deaths(site: int | str) -> str:
    """Written by the lighthouse for the launcher: how many processes of the site have ended."""
    return f"deaths/{site}"


def dead(site: int | str) -> str:
    """Written by the lighthouse: the value of `deaths` after the last process that ended."""
    return f"dead/{site}"


# ------------------------------------------------------------------------------------- of one view


def end(view: str) -> str:
    """Written by any site that ends the view: the reason as text."""
    return f"end/{view}"


def admit(view: str) -> str:
    """Written by its sites when the view ends between two rounds: 1; late sites may then join."""
    return f"admit/{view}"


def here(view: str, site: int) -> str:
    """Written by a site that wants to be in the next view: 1."""
    return f"here/{view}/{site}"
