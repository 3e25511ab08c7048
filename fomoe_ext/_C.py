"""Build facts, CPU features and the tiles of grouped GEMMs, from libfomoe_facts.so.

Plain C functions called through ctypes: neither torch nor a particular Python is needed. Importing
raises ImportError where the package is not built. In a source tree in which nothing is built,
`FOLDER` is that of the installed package, if it was built from the same sources.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_NAME = "libfomoe_facts.so"
_HASHED = {".cpp", ".h", ".cu", ".cuh", ".in"}


def _open(folder: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(folder / _NAME))
    except OSError as error:
        raise ImportError(f"fomoe_ext: {folder / _NAME} does not load: {error}") from error


def sources_hash(root: Path) -> str:
    """The hash of the sources of the libraries in a source tree, as CMakeLists.txt computes it."""
    found = [path for path in (root / "csrc").rglob("*") if path.suffix in _HASHED]
    names = ["CMakeLists.txt", *sorted(path.relative_to(root).as_posix() for path in found)]
    hashes = (hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names)
    lines = "".join(f"{hash_}  {name}\n" for hash_, name in zip(hashes, names, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _facts_of(library: ctypes.CDLL) -> dict[str, Any]:
    library.fomoe_build_facts.restype = ctypes.c_char_p
    facts: dict[str, Any] = json.loads(library.fomoe_build_facts().decode())
    return facts


def _find() -> Path:
    """The folder of the libraries. Raises ImportError that says how to build or install them."""
    if (_HERE / _NAME).exists():
        return _HERE
    root = _HERE.parent
    if not (root / "csrc").is_dir():
        raise ImportError(
            f"fomoe_ext: {_HERE / _NAME} is missing, the package is not built. Install it again, "
            "or run `pip install .` in its source tree."
        )
    # Python was started in the source tree, which hides the package that is installed.
    installed = [Path(entry or ".").resolve() / "fomoe_ext" for entry in sys.path]
    wanted, other = sources_hash(root), None
    for folder in (f for f in installed if f != _HERE and (f / _NAME).exists()):
        facts = _facts_of(_open(folder))
        if facts.get("sources_hash") == wanted:
            return folder
        other = other or f"{folder} (commit {facts['commit']})"
    if other is not None:
        raise ImportError(
            f"fomoe_ext: Python takes the package of the source tree {root}, in which nothing is "
            f"built, and the one installed in {other} was built from other sources: csrc or "
            "CMakeLists.txt differs. Run `pip install .` in the source tree to install it as it "
            "is, or start Python in another folder to use what is installed."
        )
    raise ImportError(
        f"fomoe_ext: the package is not built in the source tree {root}, and it is not installed "
        f"for this Python ({sys.executable}). Run `pip install .` in the source tree, or "
        "`python setup.py build_ext --inplace`."
    )


FOLDER = _find()
"""Where the libraries are: in this package, or in the installed one."""
_library = _open(FOLDER)


def _declare(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(_library, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


_text, _int32, _int64 = ctypes.c_char_p, ctypes.c_int32, ctypes.c_int64
_error = _declare("fomoe_error", _text)
_isa_name = _declare("fomoe_isa_name", _text, _int32)
_isa_found = _declare("fomoe_isa_found", _int32)
_isa_chosen = _declare("fomoe_isa_chosen", _int32)
_tile_at = _declare(
    "fomoe_expert_tile_at",
    _text,
    *(_int32, ctypes.POINTER(_text), ctypes.POINTER(_int32), ctypes.POINTER(_int32)),
)
_tile = _declare("fomoe_expert_tile", _text, _text, _text, _int64, _int64, ctypes.c_bool)
_facts = _facts_of(_library)


def build_facts() -> dict[str, Any]:
    """torch (version built against), compiler, build_type, cuda (version or None), cuda_archs
    (list, as CMake names them), cuda_archs_from (what chose them, or None), commit."""
    hidden = ("_files", "_hash")
    facts = {key: value for key, value in _facts.items() if not key.endswith(hidden)}
    return facts | {key: facts[key] or None for key in ("cuda", "cuda_archs_from")}


def built_from() -> str:
    """`sources_hash` of the tree that the libraries were built from; "" if it is not recorded."""
    return str(_facts.get("sources_hash", ""))


def _isa_names() -> list[str]:
    names: list[str] = []
    while (name := _isa_name(len(names))) is not None:
        names.append(name.decode())
    return names


def cpu_features() -> dict[str, Any]:
    """found and chosen (instruction set names), available (list, ascending).

    Raises RuntimeError when FOMOE_CPU_ISA is unknown or more than this CPU and build have.
    """
    chosen = _isa_chosen()
    if chosen < 0:
        raise RuntimeError(_error().decode())
    names, found = _isa_names(), _isa_found()
    return {"found": names[found], "chosen": names[chosen], "available": names[: found + 1]}


def cpu_kernels() -> dict[str, list[str]]:
    """Kernel file compiled into libfomoe_cpu.so -> its instruction sets.

    "gemm_avx2" -> gemm: [..., avx2]. A name without an instruction set counts as scalar; so does
    the file that only picks one.
    """
    kernels: dict[str, list[str]] = {}
    for file in _facts["cpu_files"]:
        isa = next((name for name in _isa_names() if file.endswith(f"_{name}")), None)
        verb = file if isa is None else file.removesuffix(f"_{isa}")
        isas = kernels.setdefault(verb, [])
        if (isa or "scalar") not in isas:
            isas.append(isa or "scalar")
    return kernels


def cuda_kernels() -> list[str]:
    """Kernel files compiled into libfomoe_cuda.so, empty without CUDA."""
    return list(_facts["cuda_files"])


def expert_tiles() -> list[dict[str, Any]]:
    """The tiles that grouped GEMMs can run with, each a dict: name, kernel, rows, columns."""
    tiles: list[dict[str, Any]] = []
    kernel, rows, columns = _text(), _int32(), _int32()
    out = (ctypes.byref(kernel), ctypes.byref(rows), ctypes.byref(columns))
    while (name := _tile_at(len(tiles), *out)) is not None:
        assert kernel.value is not None
        tiles.append(
            {
                "name": name.decode(),
                "kernel": kernel.value.decode(),
                "rows": rows.value,
                "columns": columns.value,
            }
        )
    return tiles


def expert_tile(verb: str, dtype: str, columns: int, terms: int, hopper: bool) -> str:
    """The tile that a grouped GEMM runs with.

    verb: expand, contract, contract_backward, grouped_rows or weight_grad; dtype: float32, bfloat16
    or float16; columns: of its sums (expand's gate and up columns both count); terms: of each sum,
    0 where only the device knows (weight_grad); hopper: whether the device is a Hopper GPU.
    FOMOE_EXPERTS_TILE overrides it where dtype and device allow. Raises ValueError for an unknown
    verb, dtype or tile.
    """
    name = _tile(verb.encode(), dtype.encode(), columns, terms, hopper)
    if name is None:
        raise ValueError(_error().decode())
    return name.decode()
