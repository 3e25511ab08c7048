"""Which GPU architectures the build is for: environment variables, GPUs found, the default."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from native_build import ROOT, configure, module, run

cuda_archs = module("cuda_archs")
DEFAULT = cuda_archs.DEFAULT


def no_gpus() -> list[tuple[int, int]]:
    return []


def must_not_ask() -> list[tuple[int, int]]:
    raise AssertionError("the GPUs were asked for where a variable says enough")


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("80;90a", ("80-real", "90a-real", "80-virtual")),
        ("90a", ("90a-real",)),
        ("120; 86 ;80", ("80-real", "86-real", "120-real", "120-virtual")),
        ("100f", ("100f-real",)),
    ],
)
def test_fomoe_cuda_archs(text, entries):
    """FOMOE_CUDA_ARCHS comes before TORCH_CUDA_ARCH_LIST and the GPUs found."""
    environment = {"FOMOE_CUDA_ARCHS": text, "TORCH_CUDA_ARCH_LIST": "8.9"}
    chosen = cuda_archs.choose(environment, must_not_ask)
    assert chosen.entries == entries
    assert chosen.why == f"FOMOE_CUDA_ARCHS={text}" and chosen.otherwise == ()


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("8.0;9.0a", ("80-real", "90a-real")),
        ("8.0 9.0+PTX", ("80-real", "90-real", "90-virtual")),
        ("Hopper", ("90-real", "90-virtual")),
        ("Ampere Ada", ("80-real", "86-real", "89-real", "86-virtual", "89-virtual")),
        ("Ampere+Tegra", ("87-real",)),
        ("12.1a+PTX", ("121a-real", "121a-virtual")),
        ("8.6;;8.6 8.0", ("80-real", "86-real")),
    ],
)
def test_torch_cuda_arch_list(text, entries):
    chosen = cuda_archs.choose({"TORCH_CUDA_ARCH_LIST": text}, must_not_ask)
    assert chosen.entries == entries
    assert chosen.why == f"TORCH_CUDA_ARCH_LIST={text}" and chosen.otherwise == ()


def test_torch_reads_torch_cuda_arch_list_alike(monkeypatch):
    """For every version and name that we accept, the installed torch's builder gives the same."""
    extension = pytest.importorskip("torch.utils.cpp_extension")
    names = [name for name in cuda_archs.NAMES if name.startswith(("A", "H", "B"))]
    assert len(names) == 6
    both = 0
    for text in [*cuda_archs.SUPPORTED, *(f"{v}+PTX" for v in cuda_archs.SUPPORTED), *names]:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
        try:
            flags = extension._get_cuda_arch_flags()
        except ValueError:  # a torch that does not know this chip
            continue
        found = re.findall(r"code=(sm|compute)_(\w+)", " ".join(flags))
        theirs = {f"{arch}-{'real' if kind == 'sm' else 'virtual'}" for kind, arch in found}
        if text.startswith("Blackwell"):  # other chips in other versions of torch
            continue
        assert set(cuda_archs.parse_torch(text)) == theirs, text
        both += 1
    assert both >= 10


@pytest.mark.parametrize(
    "text", ["75", "80;", "80,90a", "8.0", "sm_80", "native", "80-real", "90b"]
)
def test_bad_fomoe_cuda_archs(text):
    with pytest.raises(cuda_archs.BadArchs) as raised:
        cuda_archs.choose({"FOMOE_CUDA_ARCHS": text, "TORCH_CUDA_ARCH_LIST": "8.0"}, no_gpus)
    message = str(raised.value)
    assert message.startswith('FOMOE_CUDA_ARCHS must be architectures from 80 on, e.g. "80;90a"')
    assert ", got " in message and repr(text) in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("7.5 8.0", "7.5"),
        ("Turing;8.0", "Turing"),
        ("Common", "Common"),
        ("hopper", "hopper"),
        ("8.0,9.0", "8.0,9.0"),
        ("9.0+ptx", "9.0+ptx"),
        ("9.0+", "9.0+"),
        ("90a", "90a"),
        (";", ";"),
    ],
)
def test_bad_torch_cuda_arch_list(text, part):
    with pytest.raises(cuda_archs.BadArchs) as raised:
        cuda_archs.choose({"TORCH_CUDA_ARCH_LIST": text}, no_gpus)
    message = str(raised.value)
    assert message.startswith("TORCH_CUDA_ARCH_LIST must be architectures from 8.0 on")
    assert f", got {part!r}" in message and repr(text) in message
    assert "9.0a" in message and "Hopper" in message


@pytest.mark.parametrize(
    ("gpus", "entries", "why"),
    [
        ([], DEFAULT, "default, as nvidia-smi finds no GPU"),
        ([(9, 0)], ("90a-real",), "GPUs of this machine, compute capability 9.0"),
        ([(8, 6)], ("86-real",), "GPUs of this machine, compute capability 8.6"),
        (
            [(8, 9), (12, 0)],
            ("89-real", "120-real", "120-virtual"),
            "GPUs of this machine, compute capability 8.9, 12.0",
        ),
        ([(7, 5), (9, 0)], DEFAULT, "default, as a GPU of compute capability 7.5 is too old"),
    ],
)
def test_default_architectures(gpus, entries, why):
    for environment in ({}, {"FOMOE_CUDA_ARCHS": "", "TORCH_CUDA_ARCH_LIST": " native "}):
        chosen = cuda_archs.choose(environment, lambda: gpus)
        assert (chosen.entries, chosen.why) == (entries, why)
        # An nvcc that is older than the GPU does not stop the build.
        assert chosen.otherwise == (() if entries == DEFAULT else DEFAULT)


def nvidia_smi(folder: Path, script: str) -> None:
    """Puts a program of that name into the folder."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "gpus"),
    [
        ('[ "$1" = --query-gpu=compute_cap ] && printf "9.0\\n8.0\\n9.0\\n"', [(8, 0), (9, 0)]),
        ('printf "12.1\\n[N/A]\\n"', [(12, 1)]),
        ("echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2", []),
        ("echo No devices were found", []),
    ],
)
def test_gpus_are_those_that_nvidia_smi_tells(script, gpus, tmp_path, monkeypatch):
    nvidia_smi(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert cuda_archs.find_gpus() == gpus


def test_no_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda_archs.find_gpus() == []


# ---- what CMake makes of it ----------------------------------------------------------------------


def cmake_says(folder: Path, text: str) -> str:
    """The output of a cmake script that includes cuda_archs.cmake."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is needed: pip install cmake")
    script = folder / "script.cmake"
    script.write_text(
        f'include("{ROOT}/build_tools/cuda_archs.cmake")\n{text}\nmessage("${{answer}}")\n'
    )
    return run("cmake", "-P", script).strip()


def codes(flags: str) -> set[str]:
    """What nvcc is to make, e.g. "compute_80: sm_80" """
    found = re.findall(r"--generate-code=arch=(\w+),code=\[(.*?)\]", flags)
    return {f"{front}: {code}" for front, made in found for code in made.split(",")}


@pytest.mark.parametrize(
    ("archs", "made"),
    [
        (
            "80-real;90a-real;80-virtual",
            {"compute_80: sm_80", "compute_80: sm_90a", "compute_80: compute_80"},
        ),
        ("90a-real", {"compute_90a: sm_90a"}),
        ("90-real;90-virtual", {"compute_90: sm_90", "compute_90: compute_90"}),
        (
            "90a-real;120-real;120-virtual",
            {"compute_90a: sm_90a", "compute_120: sm_120", "compute_120: compute_120"},
        ),
        ("89-real;100-real;100-virtual", {"compute_89: sm_89", "compute_89: sm_100"}),
        ("100a-real;80-real", {"compute_80: sm_100a", "compute_80: sm_80"}),
    ],
)
def test_one_front_end_makes_the_code_of_every_newer_architecture(archs, made, tmp_path):
    """PTX is for the architecture in its name."""
    if "100-virtual" in archs:
        made = made | {"compute_100: compute_100"}
    flags = cmake_says(tmp_path, f"cuda_arch_flags(answer {archs})")
    assert codes(flags) == made
    assert flags.count("--generate-code") == len({code.split(":")[0] for code in made})


def test_an_invalid_architecture_stops_cmake(tmp_path):
    with pytest.raises(AssertionError, match=r"FOMOE_CUDA_ARCHS must be like .*, got '80'"):
        cmake_says(tmp_path, "cuda_arch_flags(answer 80)")


def test_an_architecture_that_nvcc_does_not_know(tmp_path):
    """An architecture with a suffix counts as known with its base; no error if nvcc lists none."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --list-gpu-code ] && printf "sm_80\\nsm_90\\nsm_1000\\n"\n'
    )
    nvcc.chmod(0o755)
    asked = "80-real;90a-real;100-real;103a-real;100-virtual"
    assert cmake_says(tmp_path, f'unknown_archs(answer "{nvcc}" {asked})') == "100;103"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert cmake_says(tmp_path, f'unknown_archs(answer "{nvcc}" {asked})') == ""


@pytest.mark.parametrize(
    ("archs", "otherwise", "said"),
    [
        ("90-real", "", "library for 90-real (me)"),
        ("999-real", "80-real;90a-real", "library for 80-real;90a-real (default, as CUDA"),
        ("999-real", "", "does not know the GPU architecture 999 (me)"),
    ],
)
def test_what_is_built(archs, otherwise, said, tmp_path):
    """Code for 9.0 comes with the kernels for Hopper. What nvcc does not know is an error where it
    was asked for, else (GPUs that were found) the default is taken."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is needed")
    given = {"FOMOE_CUDA": "on", "FOMOE_CUDA_ARCHS": archs, "FOMOE_CUDA_ARCHS_FROM": "me"}
    given["FOMOE_CUDA_ARCHS_ELSE"] = otherwise
    options = [f"-D{name}={value}" for name, value in given.items()]
    try:
        words = configure(tmp_path, *options)
    except AssertionError as error:
        words = str(error).replace("\\n", "\n")
        assert archs == "999-real" and otherwise == ""
    assert said in " ".join(words.split())
    if "does not know the GPU" not in said:
        entries = json.loads((tmp_path / "compile_commands.json").read_text())
        commands = {Path(entry["file"]).name: entry["command"] for entry in entries}
        assert codes(commands["experts_bf16_sm90.cu"]) == {"compute_90a: sm_90a"}
        assert "FOMOE_HAVE_SM90A" in commands["experts.cu"]
        oldest = min(archs, otherwise or archs)[:2]
        assert f"compute_{oldest}: sm_{oldest}" in codes(commands["route.cu"])
