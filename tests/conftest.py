"""What all tests share: the devices that kernels run on, the flags of a small job."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

# With `pytest -n`, each worker and the processes that it starts use their share of the cores.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (PROCESSORS or 1) // WORKERS)))

import pytest  # noqa: E402

# A failing assert shows its values in helper modules too.
_here = Path(__file__).parent
_modules = {path.stem for path in (*_here.glob("*.py"), *_here.glob("*/*.py"))}
pytest.register_assert_rewrite(*_modules - {"conftest", "__init__"})

import small_job  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from kernel_device import Device  # noqa: E402

# The same examples in every run, however slow the machine.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# Python processes that tests start find the package under test, not a source tree without
# libraries that happens to be the current folder.
os.environ["PYTHONSAFEPATH"] = "1"
_package = importlib.util.find_spec("fomoe_ext")
if _package is not None and _package.origin is not None:
    _home = Path(_package.origin).parent.parent
    if (_home / "pyproject.toml").exists():  # not installed, built in place
        os.environ["PYTHONPATH"] = str(_home)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The number of workers of `pytest -n auto`: each takes about 2 GB."""
    return min(PROCESSORS or 1, 8)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """With `pytest -n` and no `--dist`, an idle worker takes tests from another.

    This hook runs before xdist's, which would choose another mode.
    """
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread unless a test sets more: waiting threads are slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of real text, and a cache of tokens of their own."""
    folder = tmp_path_factory.mktemp("text")
    for module in ("argparse", "ast", "calendar", "cmd", "copy", "csv"):
        shutil.copy(sys.modules["os"].__file__.replace("os.py", f"{module}.py"), folder)
    return folder


@pytest.fixture
def flags(text: Path, tmp_path: Path) -> list[str]:
    """Flags of a small job of two sites, each of which holds half of the experts."""
    cache = ["--cache-dir", str(text / "cache")]
    sites = ["--sites", "2", "--replication", "1", "--run-dir", str(tmp_path / "run")]
    return [*small_job.SMALL, *sites, "--data", str(text / "*.py"), *cache]


@pytest.fixture(scope="session")
def emulated() -> Device:
    """The CUDA kernels compiled for the CPU."""
    import emulator

    if emulator.compiler() is None:
        pytest.skip("no C++ compiler: the CUDA kernels cannot be emulated")
    emulator.load()
    return Device("emulated", "cpu", emulator.NAMESPACE)


# Session scope, so that Hypothesis may draw many inputs for one device.
@pytest.fixture(scope="session", params=["cpu", "emulated", "cuda"])
def device(request: pytest.FixtureRequest) -> Device:
    """Every device in turn; `cuda` is skipped where torch sees no GPU."""
    name = request.param
    if name == "emulated":
        return request.getfixturevalue("emulated")
    from fomoe_ext.ops import native  # here, so that tests without kernels run in an unbuilt tree

    if name == "cuda" and not native.cuda_loaded:
        pytest.skip("no GPU, or fomoe_ext was built without CUDA")
    return Device(name, name)
