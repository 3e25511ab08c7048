"""The build: stable ABI, CUDA machine code without spills, wheels, other versions of torch."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from native_build import ROOT, configure, module, run

import fomoe_ext
from fomoe_ext import _C

PACKAGE = Path(fomoe_ext.__file__).parent
LIBRARIES = ["libfomoe_cpu.so", "libfomoe_cuda.so"]  # those of torch ops
EVERY = [*LIBRARIES, "libfomoe_facts.so"]


def built(library: str) -> Path:
    path = PACKAGE / library
    if not path.exists():
        assert library == "libfomoe_cuda.so" and _C.build_facts()["cuda"] is None
        pytest.skip("built without CUDA")
    return path


@pytest.mark.parametrize("library", LIBRARIES)
def test_only_the_stable_abi(library):
    """The libraries use no C++ symbol of torch, only functions of its stable C ABI."""
    if shutil.which("nm") is None:
        pytest.skip("nm is needed (binutils)")
    symbols = run("nm", "-D", "--undefined-only", built(library)).split()
    needed = [s for s in symbols if re.search(r"aoti_torch|torch_|c10|N2at|N5torch", s)]
    assert any(s.startswith(("aoti_torch_", "torch_")) for s in needed)
    assert [s for s in needed if s.startswith("_Z")] == []


@pytest.mark.parametrize("library", EVERY)
def test_no_python_and_no_cuda_library_is_needed(library):
    """The libraries call no function of Python, so that every version can load them."""
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("readelf and nm are needed (binutils)")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", built(library)))
    assert needed and not [n for n in needed if re.search(r"python|cudart|cublas", n)]
    assert ("libtorch_cpu.so" in needed) == (library in LIBRARIES)
    symbols = run("nm", "-D", "--undefined-only", built(library)).split()
    assert [s for s in symbols if s.startswith(("Py", "_Py"))] == []


def other_pythons() -> list[str]:
    """Interpreters of other versions that this machine has, on PATH or where pyenv puts them."""
    versions = [f"3.{minor}" for minor in range(11, 20) if minor != sys.version_info.minor]
    found = [shutil.which(f"python{version}") for version in versions]
    pyenv = Path.home() / ".pyenv/versions"
    found += [str(p) for v in versions for p in sorted(pyenv.glob(f"{v}.*/bin/python"))]
    # pyenv's stand-ins on PATH only work for versions that are switched on.
    works = lambda python: subprocess.run([python, "-V"], capture_output=True).returncode == 0
    return [python for python in found if python is not None and works(python)]


# _C.py uses the standard library alone, so the file can be run by itself.
FACTS = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
tile = _C.expert_tile("expand", "bfloat16", 1024, 0, True)
facts = [_C.build_facts(), _C.cpu_features(), _C.cpu_kernels(), _C.cuda_kernels()]
print(json.dumps([*facts, _C.expert_tiles(), tile]))
"""


def test_every_python_reads_the_same_facts():
    pythons = other_pythons()
    if not pythons:
        pytest.skip("another Python, 3.11 or newer, is needed")
    module = str(PACKAGE / "_C.py")
    here = run(sys.executable, "-c", FACTS, module)
    assert "multistage_64" in here
    for python in pythons:
        assert run(python, "-I", "-c", FACTS, module) == here, python


def test_a_word_that_is_not_a_choice_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="FOMOE_CUDA must be on, off or auto, got 'maybe'"):
        configure(tmp_path, "-DFOMOE_CUDA=maybe")


def test_without_nvcc_the_build_says_so_in_one_line(tmp_path, monkeypatch):
    """`auto` builds for the CPU, `on` stops. nvcc is hidden by the path of a missing program."""
    monkeypatch.setenv("CUDACXX", str(tmp_path / "no-nvcc"))
    said = configure(tmp_path / "auto", "-DFOMOE_CUDA=auto")
    lines = [line for line in said.splitlines() if line.startswith("-- fomoe_ext:")]
    assert lines == ["-- fomoe_ext: no working nvcc found, building for the CPU only"]
    with pytest.raises(AssertionError, match="FOMOE_CUDA=on, but no working nvcc was found"):
        configure(tmp_path / "on", "-DFOMOE_CUDA=on")


# ---- packages ------------------------------------------------------------------------------------


def clean_copy(folder: Path) -> Path:
    """The source tree without what earlier builds left in it."""
    ignore = shutil.ignore_patterns(
        "build", "*.so", ".git", "runs", ".venv", "*.egg-info", ".*cache"
    )
    return Path(shutil.copytree(ROOT, folder / "source", ignore=ignore))


def new_environment(folder: Path) -> Path:
    """A fresh virtual environment; returns its Python."""
    venv.create(folder, with_pip=True)
    return folder / "bin/python"


# Run with -P and a PYTHONPATH: the package tried is the one there, whatever the current folder.
SMOKE = """
import torch, fomoe_ext
layer = fomoe_ext.MoELayer(32, 16, 4, 2, resident_experts=[0, 2])
x = torch.randn(6, 32, requires_grad=True)
layer(x).sum().backward()
assert x.grad.isfinite().all()
print(torch.__version__, fomoe_ext.__file__)
"""


# Under a CUDA build of torch the CUDA library loads, also where there is no GPU.
CUDA_SMOKE = """
import pathlib, torch, fomoe_ext
assert torch.version.cuda is not None, torch.__version__
library = pathlib.Path(fomoe_ext.__file__).parent / "libfomoe_cuda.so"
if library.exists():
    torch.ops.load_library(library)
print(torch.version.cuda, library.exists())
"""


@pytest.mark.slow
def test_wheel_built_in_isolation(tmp_path):
    """`pip install .` where there is no torch: the wheel is whole and works from site-packages."""
    python = new_environment(tmp_path / "env")
    source = clean_copy(tmp_path)
    pip = (python, "-m", "pip")
    run(*pip, "wheel", "--no-deps", "-w", tmp_path, source, FOMOE_CUDA="off", PYTHONPATH="")
    (wheel,) = tmp_path.glob("fomoe_ext-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fomoe_ext/py.typed", "fomoe_ext/libfomoe_cpu.so", "fomoe_ext/train/process.py"} <= set(
        names
    )
    # For every Python from 3.11 on: no file name has a version of Python.
    assert re.fullmatch(r"fomoe_ext-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    libraries = {name for name in names if name.endswith(".so")}
    assert libraries == {"fomoe_ext/libfomoe_cpu.so", "fomoe_ext/libfomoe_facts.so"}
    assert not [n for n in names if re.search(r"cpython|cp3\d|\.pyc$", n)]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [n for n in names if not n.startswith(("fomoe_ext/", "fomoe_ext-"))]

    # The torch of this environment takes the place of the one that pip would install.
    site = tmp_path / "site"
    run(*pip, "install", "--quiet", "--no-deps", "--target", site, wheel, PYTHONPATH="")
    said = run(sys.executable, "-P", "-c", SMOKE, PYTHONPATH=str(site))
    assert str(site) in said


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.11.0"])
def test_one_build_runs_on_another_torch(tmp_path, version):
    """The libraries at hand, built against the installed torch, in an environment with another:
    the wheel that pip takes by default on Linux (x86-64), which is a CUDA build.
    """
    import torch

    if torch.__version__.startswith(version):
        pytest.skip(f"torch {version} is the one installed")
    python = new_environment(tmp_path / "env")
    run(python, "-m", "pip", "install", "-q", f"torch=={version}", "numpy", PYTHONPATH="")
    shutil.copytree(PACKAGE, tmp_path / "site/fomoe_ext")
    said = run(python, "-P", "-c", SMOKE, PYTHONPATH=str(tmp_path / "site"))
    assert said.startswith(version) and str(tmp_path / "site") in said
    if (sys.platform, platform.machine()) == ("linux", "x86_64"):
        said = run(python, "-P", "-c", CUDA_SMOKE, PYTHONPATH=str(tmp_path / "site"))
        assert said.split()[-1] == str((PACKAGE / "libfomoe_cuda.so").exists())

    # And the other way round: built there, against that torch, which isolation does not hide.
    build = ["install", "--verbose", "--no-deps", clean_copy(tmp_path)]
    said = run(python, "-m", "pip", *build, FOMOE_CUDA="off", PYTHONPATH="")
    assert f"fomoe-ext: building with torch {version}" in said
    said = run(python, "-P", "-c", SMOKE, PYTHONPATH="")
    assert said.startswith(version) and str(tmp_path / "env") in said


def fake_torch(site: Path, version: str, headers: bool = True) -> Path:
    """Files of an installed torch, as far as its build looks for them; the package's folder."""
    (site / f"torch-{version}.dist-info").mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
    (site / f"torch-{version}.dist-info/METADATA").write_text(metadata)
    folder = site / "torch/include/torch/csrc/stable"
    folder.mkdir(parents=True)
    if headers:
        (folder / "library.h").touch()
    return site / "torch"


def test_the_build_takes_the_torch_that_is_there(tmp_path, monkeypatch):
    """The first complete one that is new enough; pip fetches one only if there is none."""
    backend = module("build_backend")
    fake_torch(tmp_path / "old", "2.9.1")
    fake_torch(tmp_path / "bare", "2.13.0", headers=False)
    good = fake_torch(tmp_path / "good", "2.10.0+cpu")
    fake_torch(tmp_path / "later", "2.13.0")
    folders = [str(tmp_path / name) for name in ("none", "old", "bare", "good", "later")]
    assert backend.find_torch(folders) == backend.Torch(good, "2.10.0+cpu")
    assert backend.find_torch(folders[:3]) is None

    # Of the environment that is installed into, though isolation takes it off sys.path.
    monkeypatch.setattr(sys, "path", folders[:3])
    assert backend.find_torch() is not None
    assert backend._requirements(["ninja"]) == ["ninja"]
    empty = {"purelib": folders[0], "platlib": folders[1]}
    monkeypatch.setattr(backend.sysconfig, "get_paths", lambda: empty)
    assert backend._requirements(["ninja"]) == ["ninja", backend.FETCHED]


@pytest.mark.slow
def test_editable_build_and_rebuild(tmp_path):
    """`setup.py build_ext --inplace`; after touching one kernel only that one is compiled again."""
    source = clean_copy(tmp_path)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "FOMOE_CUDA": "off"}
    subprocess.run(build, cwd=source, check=True, env=environment, capture_output=True)
    kernel = source / "csrc/cpu/rows/compact.cpp"
    kernel.write_text(kernel.read_text() + "// touched\n")
    again = subprocess.run(
        build, cwd=source, check=True, env=environment, capture_output=True, text=True
    )
    compiled = re.findall(r"Building CXX object \S+/(\w+\.cpp)\.o", again.stdout)
    assert sorted(compiled) == ["compact.cpp", "facts.cpp"]  # whose output lists what was built
    said = run(sys.executable, "-P", "-c", SMOKE, PYTHONPATH=str(source))
    assert str(source) in said
