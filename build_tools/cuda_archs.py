"""Chooses the GPU architectures of the build, for setup.py; CMakeLists.txt turns them into flags.

The first of these that is set or found is taken: FOMOE_CUDA_ARCHS ("80;90a"), TORCH_CUDA_ARCH_LIST
as torch's own builder of extensions reads it ("8.0;9.0a", "8.0 9.0+PTX", "Hopper"), the GPUs of
this machine, DEFAULT.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

DEFAULT = ("80-real", "90a-real", "80-virtual")
OLDEST = 80

# Architectures of the names that torch knows; what is older than 8.0 is refused by its name.
NAMES = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
SUPPORTED = {"8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1"}
# Those with features of their own, e.g. 9.0a.
SUPPORTED |= {f"{version}a" for version in SUPPORTED if float(version) >= 9}


class BadArchs(ValueError):
    """An environment variable asks for what cannot be built; the message names it."""


@dataclass(frozen=True)
class Archs:
    """What to build for: entries as CMake names them (80-real, 80-virtual) and why. `otherwise`:
    what to build for where nvcc does not know these; empty where that is an error.
    """

    entries: tuple[str, ...]
    why: str
    otherwise: tuple[str, ...] = ()


def ordered(entries: Iterable[str]) -> tuple[str, ...]:
    """Each once: machine code in ascending order, then PTX."""

    def key(entry: str) -> tuple[bool, int, str]:
        match = re.match(r"\d+", entry)
        assert match is not None
        return entry.endswith("-virtual"), int(match[0]), entry

    return tuple(sorted(set(entries), key=key))


def parse_plain(text: str) -> tuple[str, ...]:
    """FOMOE_CUDA_ARCHS: machine code for each, and PTX of the newest one without a letter (those
    with a letter do not run on newer chips) for future GPUs. Raises BadArchs."""
    archs = [part.strip() for part in text.split(";")]
    for arch in archs:
        match = re.fullmatch(r"(\d{2,3})[af]?", arch)
        if match is None or int(match[1]) < OLDEST:
            raise BadArchs(
                f'FOMOE_CUDA_ARCHS must be architectures from {OLDEST} on, e.g. "80;90a", '
                f"got {arch!r} in {text!r}"
            )
    plain = [int(arch) for arch in archs if arch.isdigit()]
    ptx = [f"{max(plain)}-virtual"] if plain else []
    return ordered([*(f"{arch}-real" for arch in archs), *ptx])


def parse_torch(text: str) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST: versions and names between semicolons or spaces; "+PTX" adds PTX.
    Raises BadArchs."""
    wanted = (
        f"from 8.0 on, of {', '.join(sorted(SUPPORTED, key=lambda v: (float(v.rstrip('a')), v)))}, "
        f"each also with +PTX, or {', '.join(list(NAMES)[8:])}"
    )
    entries: list[str] = []
    for part in filter(None, text.replace(" ", ";").split(";")):
        for version in NAMES.get(part, part).split(";"):
            number, plus, ptx = version.partition("+")
            if number not in SUPPORTED or (plus and ptx != "PTX"):
                raise BadArchs(
                    f"TORCH_CUDA_ARCH_LIST must be architectures {wanted}, got {part!r} in "
                    f'{text!r} (or set FOMOE_CUDA_ARCHS, e.g. "80;90a")'
                )
            arch = number.replace(".", "")
            entries.append(f"{arch}-real")
            if ptx:
                entries.append(f"{arch}-virtual")
    if not entries:
        raise BadArchs(f"TORCH_CUDA_ARCH_LIST must be architectures {wanted}, got {text!r}")
    return ordered(entries)


def find_gpus() -> list[tuple[int, int]]:
    """Compute capabilities of this machine's GPUs, as nvidia-smi tells them; none without it."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    found = [re.fullmatch(r"(\d+)\.(\d+)", line.strip()) for line in said.stdout.splitlines()]
    return sorted({(int(match[1]), int(match[2])) for match in found if match is not None})


def of_gpus(gpus: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    """Machine code for these GPUs alone, on Hopper with its own instructions; PTX where the chip
    may have successors that have no code of ours yet."""
    entries: list[str] = []
    for major, minor in gpus:
        arch = f"{major}{minor}"
        entries.append("90a-real" if arch == "90" else f"{arch}-real")
        if major >= 10:
            entries.append(f"{arch}-virtual")
    return ordered(entries)


def choose(
    environment: Mapping[str, str] = os.environ,
    gpus: Callable[[], list[tuple[int, int]]] = find_gpus,
) -> Archs:
    """What to build for. Raises BadArchs; an empty variable counts as not set, and
    TORCH_CUDA_ARCH_LIST=native as the GPUs of this machine."""
    if text := environment.get("FOMOE_CUDA_ARCHS", "").strip():
        return Archs(parse_plain(text), f"FOMOE_CUDA_ARCHS={text}")
    text = environment.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if text and text != "native":
        return Archs(parse_torch(text), f"TORCH_CUDA_ARCH_LIST={text}")
    found = gpus()
    names = ", ".join(f"{major}.{minor}" for major, minor in found)
    if not found:
        return Archs(DEFAULT, "default, as nvidia-smi finds no GPU")
    if old := [gpu for gpu in found if gpu < (8, 0)]:
        wrong = ", ".join(f"{major}.{minor}" for major, minor in old)
        return Archs(DEFAULT, f"default, as a GPU of compute capability {wrong} is too old")
    return Archs(of_gpus(found), f"GPUs of this machine, compute capability {names}", DEFAULT)
