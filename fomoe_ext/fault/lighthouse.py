"""The process that knows which sites are present: torchft's lighthouse and a key-value store.

It outlives the sites and handles no weights. A job has one: the launcher starts it or, for sites on
several machines, the user runs `fomoe lighthouse`. Both servers bind to the loopback interface by
default. Another interface requires a shared secret (`fomoe_ext.fault.secret`).
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import ipaddress
import json
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from fomoe_ext.config.addresses import Address, listen, parse_address, require_listener
from fomoe_ext.config.fault import FaultConfig
from fomoe_ext.extras import NotInstalled
from fomoe_ext.fault import keys
from fomoe_ext.fault.secret import own_secret

LIGHTHOUSE = "FOMOE_LIGHTHOUSE"
"""Variable with which the launcher gives the sites the address of its lighthouse."""
JOIN_MS = 300
"""How long the lighthouse waits for a live site that has not asked for a quorum. It may be short:
sites wait for each other before they ask (`membership`)."""
_TICK_MS = 50
_ANSWER_S = 5.0
"""How long to wait for a lighthouse that is started at the same time."""


def torchft() -> Any:
    """torchft's native module: LighthouseServer, LighthouseClient.

    The package around it is not imported, because its telemetry takes seconds to import. Raises
    NotInstalled if torchft is missing.
    """
    package = importlib.util.find_spec("torchft")
    for folder in (package.submodule_search_locations or []) if package else []:
        finder = importlib.machinery.FileFinder(
            folder,
            (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES),
        )
        spec = finder.find_spec("_torchft")
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise NotInstalled("fault.membership = torchft", "torchft", "fault")


def require_lighthouse(address: Address, name: str) -> None:
    """Raises OSError if nothing listens at the address. `name`: the option that gave it."""
    hint = "is `fomoe lighthouse` running there, and does its --bind let this machine reach it?"
    require_listener(address, name, _ANSWER_S, hint)


def require_secret(host: str) -> None:
    """Raises ValueError if other machines can reach the address and the run has no secret."""
    if host == "localhost" or _is_loopback(host):
        return
    if not own_secret():
        raise ValueError(
            f"other machines can reach {host}: set FOMOE_SECRET to a shared secret of at least 16 "
            "characters, the same for the lighthouse and all sites"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Lighthouse:
    """Both servers, listening. `address`: HOST:PORT of the store, which is given to the sites."""

    def __init__(self, bind: Address, quorum: int, silent_s: float) -> None:
        """Raises NotInstalled without torchft, ValueError if `bind` requires a secret and there is
        none, OSError for an address that cannot be bound."""
        native = torchft()
        require_secret(bind.host)
        import torch.distributed as dist

        listener = listen(bind, "--bind")
        host, bound = listener.getsockname()[:2]  # numeric: a name may have several addresses
        store = dist.TCPStore(
            host,
            bound,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=30),
            master_listen_fd=listener.detach(),
        )
        self._server = native.LighthouseServer(
            bind=str(Address(host, 0)),
            min_replicas=quorum,
            join_timeout_ms=JOIN_MS,
            quorum_tick_ms=_TICK_MS,
            heartbeat_timeout_ms=round(1000 * silent_s),
        )
        self._store = dist.PrefixStore(keys.root(), store)
        self._store.set(keys.LIGHTHOUSE_PORT, self._server.address().rpartition(":")[2])
        self.address = str(bind._replace(port=bound))

    def dead(self, site: str) -> None:
        """Tells the sites that the process of `site` has ended."""
        self._store.set(keys.dead(site), str(self._store.add(keys.deaths(site), 1)))

    def shutdown(self) -> None:
        """Ends the lighthouse; the store ends with the process."""
        self._server.shutdown()


def serve(bind: Address, quorum: int, silent_s: float, until_eof: bool = False) -> None:
    """Prints the address as JSON and serves until a signal or, with `until_eof`, stdin's end.

    A line "dead SITE" on stdin calls `Lighthouse.dead`. Raises what `Lighthouse` does.
    """
    lighthouse = Lighthouse(bind, quorum, silent_s)
    print(json.dumps({"lighthouse": lighthouse.address}), flush=True)
    try:
        for line in sys.stdin:
            words = line.split()
            if len(words) == 2 and words[0] == "dead":
                lighthouse.dead(words[1])
        while not until_eof:
            signal.pause()
    except KeyboardInterrupt:
        pass
    lighthouse.shutdown()


def main(arguments: Sequence[str] | None = None) -> int:
    """`fomoe lighthouse`: serves until interrupted; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="fomoe lighthouse",
        description="Keeps track of the sites of one fault-tolerant job on several machines. Give "
        "its address to the sites with --lighthouse.",
    )
    parser.add_argument(
        "--bind",
        default="127.0.0.1:29600",
        help="HOST:PORT to listen on ([HOST]:PORT with IPv6; port 0: any free one); an address "
        "other than loopback requires FOMOE_SECRET (default: %(default)s)",
    )
    parser.add_argument(
        "--quorum", type=int, default=1, help="fewest sites with which the job continues"
    )
    parser.add_argument(
        "--silent-s",
        type=float,
        default=3.0,
        help="seconds without a heartbeat after which a site counts as lost",
    )
    parser.add_argument("--until-eof", action="store_true", help="end when standard input ends")
    given = parser.parse_args(arguments)
    try:
        bind = parse_address(given.bind, "--bind", any_port=True)
        FaultConfig("torchft", quorum=given.quorum, silent_s=given.silent_s)
        serve(bind, given.quorum, given.silent_s, given.until_eof)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fomoe lighthouse: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
