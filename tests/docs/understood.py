"""Checks a command on a page with the parser of the program that it starts."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import runpy
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT, Block

from fomoe_ext import cli
from fomoe_ext.config.io import parse_args

TOOLS = {
    "clang-format": {"-i"},
    "git": {"ls-files"},
    "mkdocs": {"build", "serve", "--strict"},
    "ruff": {"check", "format", "."},
    "xargs": {"clang-format", "-i"},
}
"""Programs that are not ours, and the words that pages use with them."""


class _Parsed(BaseException):
    """The parser has accepted the arguments; raised so that the program does not run."""


def understood(words: Sequence[str], config: pytest.Config) -> None:
    """Raises, or fails an assertion, unless the command's flags are known. In a working folder of
    the test's own; pytest's `config` knows the flags of pytest and its plugins."""
    program, *rest = [word.replace("$SITE", "0") for word in words]
    if program == "fomoe":
        _fomoe(rest)
    elif program == "torchrun":
        _torchrun(rest)
    elif program == "python":
        _python(rest)
    elif program == "pytest":
        paths = [word for word in rest if word in ("tests", "bench") or word.startswith("tests/")]
        assert all((ROOT / path).exists() for path in paths), paths
        flags = [re.sub(r"<[^>]*>", "x", word) for word in rest]
        known = config._parser.parse_known_and_unknown_args(flags)
        assert not known[1], known[1]
    elif program == "pip":
        _pip(rest)
    elif program == "python3":
        assert rest == ["-m", "venv", ".venv"]
    elif program == ".":
        assert rest == [".venv/bin/activate"]
    elif program.startswith(".ci/"):
        assert (ROOT / program).stat().st_mode & 0o100
    else:
        files = {word for word in rest if word.startswith("*.")}
        assert set(rest) - files <= TOOLS[program], words


def _fomoe(rest: Sequence[str]) -> None:
    command, *flags = rest
    if command == "train":
        parse_args(flags)
    elif command == "info" or command == "--version":
        assert not flags
    elif command == "plan":
        assert cli.main(rest) == 0
    else:  # exit code 2 with every flag known: the run, or the secret, is missing
        assert command in ("eval", "export", "report", "lighthouse"), command
        assert cli.main(rest) == 2


def said_of(words: Sequence[str]) -> str:
    """What `fomoe eval`, export, report or lighthouse reports as missing in an empty folder."""
    return "FOMOE_SECRET" if words[1] == "lighthouse" else "runs/<name>"


def _torchrun(rest: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(list(rest))
    if given.module:
        assert given.training_script == "fomoe_ext.train"
        parse_args(given.training_script_args)
    else:
        assert given.training_script.endswith(".py") and not given.training_script_args


def _python(rest: Sequence[str]) -> None:
    if rest[0].startswith("examples/"):
        runs_them = (ROOT / "tests/hf/test_hf_trainer.py").read_text(encoding="utf-8")
        assert (ROOT / rest[0]).is_file() and f'"{Path(rest[0]).stem}"' in runs_them
        return
    if rest[:2] == ["-m", "fomoe_ext.train"]:
        parse_args(rest[2:])
        return
    if rest[0] == "-m":
        path = ROOT / rest[1].replace(".", "/")
        path, flags = path if path.is_dir() else path.with_suffix(".py"), rest[2:]
    else:
        path, flags = ROOT / rest[0], rest[1:]
    source = path / "__main__.py" if path.is_dir() else path
    text = source.read_text(encoding="utf-8")
    if "parse_args(" in text:
        _run_until_parsed(path, rest[1] if rest[0] == "-m" else None, flags)
    else:
        assert all(f'"{flag.partition("=")[0]}"' in text for flag in flags if flag[0] == "-"), flags


def _run_until_parsed(path: Path, module: str | None, flags: Sequence[str]) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *given: Any) -> None:
        parse(self, *given)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [str(path), *flags])
        patch.setattr(sys, "path", [str(ROOT), str(path.parent), *sys.path])
        with pytest.raises(_Parsed):
            if module:
                runpy.run_module(module, run_name="__main__")
            else:
                runpy.run_path(str(path), run_name="__main__")


def _pip(rest: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = extras["optional-dependencies"].keys()
    assert rest[0] == "install"
    for word in rest:
        if found := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(found[1].split(",")) <= known, word
        elif word.startswith("torch=="):
            assert word in (ROOT / ".ci/run").read_text(encoding="utf-8"), word


def keywords_known(block: Block) -> None:
    """Fails unless every name that a block imports from fomoe_ext exists, and every keyword of a
    call to one is a parameter of it."""
    ours: dict[str, Any] = {}
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fomoe_ext"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                try:
                    value = getattr(module, alias.name)
                except AttributeError:
                    value = importlib.import_module(f"{node.module}.{alias.name}")
                ours[alias.asname or alias.name] = value
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := _called(node.func, ours)) is not None:
            parameters = inspect.signature(called).parameters
            if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                continue
            for keyword in node.keywords:
                assert keyword.arg in parameters, f"{ast.unparse(node.func)}: {keyword.arg}"


def _called(function: ast.expr, ours: dict[str, Any]) -> Any:
    if isinstance(function, ast.Name):
        return ours.get(function.id)
    if isinstance(function, ast.Attribute):
        owner = _called(function.value, ours)
        return None if owner is None else getattr(owner, function.attr)
    return None
