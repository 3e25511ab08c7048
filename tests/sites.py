"""Sites for tests: a pool of processes that form Gloo worlds of any size up to the pool's."""

from __future__ import annotations

import atexit
import io
import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from typing import Any

import torch
import torch.distributed as dist

LARGEST = 4
_TIMEOUT_S = 60.0


class _Pickler(pickle.Pickler):
    """Sends tensors as arrays: multiprocessing would open a file descriptor for each."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        function, site, num_sites, store, arguments = task
        try:
            if num_sites > 1:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{store}",
                    rank=site,
                    world_size=num_sites,
                    timeout=timedelta(seconds=30),
                )
            answer = True, function(site, num_sites, *arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send_bytes(_packed(answer))


_PRELOADED = [
    "torch",
    "torch._dynamo",
    "fomoe_ext.cli",
    "fomoe_ext.train.process",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "jinja2",
]
"""Modules that each process of a test would otherwise import by itself."""


@lru_cache(maxsize=1)
def forkserver() -> Any:
    """The multiprocessing context of this test session: processes with `_PRELOADED` imported."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    saved = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")}
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    ensure_running()  # its processes inherit these variables
    for name, value in saved.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return context


class Sites:
    """A pool of processes: `run` calls a function at every site of a new world."""

    def __init__(self, largest: int = LARGEST) -> None:
        context = forkserver()
        self._folder = tempfile.TemporaryDirectory()
        self._worlds = 0
        self._processes, self._connections = [], []
        for _ in range(largest):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)

    def run(self, num_sites: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results of function(site, num_sites, *arguments) at each site. Fails if one raises or
        does not answer.

        The function must be at the top of a test module; its arguments and result are pickled.
        """
        self._worlds += 1
        store = os.path.join(self._folder.name, f"world-{self._worlds}")
        connections = self._connections[:num_sites]
        for site, connection in enumerate(connections):
            connection.send((function, site, num_sites, store, arguments))
        results, errors = [], []
        for site, connection in enumerate(connections):
            if not connection.poll(_TIMEOUT_S):
                self.close()
                pool.cache_clear()
                raise AssertionError(f"site {site} gave no answer in {_TIMEOUT_S} s")
            good, value = pickle.loads(connection.recv_bytes())
            (results if good else errors).append(value)
        assert not errors, "\n".join(errors)
        return results

    def close(self) -> None:
        """Ends the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


@lru_cache(maxsize=1)
def pool() -> Sites:
    """The one pool of this test session; its start takes seconds."""
    sites = Sites()
    atexit.register(sites.close)
    return sites
