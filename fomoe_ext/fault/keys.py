"""The keys of the store beside the lighthouse: who writes each, and what its value is.

All lie below `root()`, so that a run finds its own alone. Sites are the numbers that they keep,
`view` is a view's name (`membership.View`).
"""

from __future__ import annotations

from fomoe_ext.fault.secret import keyed

LIGHTHOUSE_PORT = "lighthouse"
"""The lighthouse: the port of its other server, in digits."""
CURRENT = "current"
"""Every site of a view, all the same: the view in force, as JSON of its name and members."""
FINISHED = "finished"
"""Sites that have come to the job's end: 1."""


def root() -> str:
    """The prefix of all keys of the run that knows our secret."""
    return keyed("store")


def of_view(view: str) -> str:
    """The prefix below which torch.distributed keeps what the process groups of a view need."""
    return f"view/{keyed('view', view)}"


# ------------------------------------------------------------------------------------- of one site


def start(site: int) -> str:
    """The site, when a job begins: 1; it waits for all others."""
    return f"start/{site}"


def beat(site: int) -> str:
    """The site, twice a second: its incarnation and a count, with a dot between."""
    return f"beat/{site}"


def incarnation(site: int) -> str:
    """The site, once a process: a counter of its processes."""
    return f"incarnation/{site}"


def knock(site: int) -> str:
    """The site, when it comes late: its incarnation, until it is taken in."""
    return f"knock/{site}"


def deaths(site: int | str) -> str:
    """The lighthouse, told by the launcher: a counter of the site's processes that have ended."""
    return f"deaths/{site}"


def dead(site: int | str) -> str:
    """The lighthouse: what `deaths` was at the last of them, where there has been one."""
    return f"dead/{site}"


# ------------------------------------------------------------------------------------- of one view


def end(view: str) -> str:
    """Whoever finds that the view cannot go on: why, in words."""
    return f"end/{view}"


def admit(view: str) -> str:
    """Its sites, when the view ends between two rounds: 1; those that have knocked may come in."""
    return f"admit/{view}"


def here(view: str, site: int) -> str:
    """A site that wants to be in the view after this one: 1."""
    return f"here/{view}/{site}"
