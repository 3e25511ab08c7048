"""The library logs and only commands print; commands also show what is logged."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import fomoe_ext
from fomoe_ext import cli
from fomoe_ext.files.unwritten import Unwritten
from fomoe_ext.launch.logs import shown, wanted_level
from fomoe_ext.launch.waiting import reason_of
from fomoe_ext.launch.world import PeerLost, with_others

PACKAGE = Path(fomoe_ext.__file__).parent
COMMANDS = {
    "cli",
    "fault/lighthouse",
    "info",
    "launch/logs",
    "link",
    "plan/args",
    "plan/command",
    "report/command",
    "train/command",
    "train/process",
}
"""Modules that are commands, or show what is logged."""


def prints(text: str) -> bool:
    """Whether a module writes to standard output or error by itself."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name) and node.id == "print":
            return True
        if isinstance(node, ast.Attribute) and node.attr == "write":
            stream = node.value
            if isinstance(stream, ast.Attribute) and stream.attr in ("stdout", "stderr"):
                return True
    return False


def test_only_commands_print():
    found = {
        path.relative_to(PACKAGE).with_suffix("").as_posix()
        for path in PACKAGE.rglob("*.py")
        if prints(path.read_text(encoding="utf-8"))
    }
    assert found == COMMANDS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("print('x')", True),
        ("say = print", True),
        ("import sys\nsys.stderr.write('x')", True),
        ("console.print('x')", False),
        ("'print(x)'", False),
    ],
)
def test_printing_is_seen(text, expected):
    assert prints(text) == expected


def test_a_command_shows_the_message_alone(capsys):
    log = logging.getLogger("fomoe_ext.launch.world")
    with shown(), shown():
        log.warning("site %d: %s", 3, "100% of it")
        log.info("fault: x")
        log.debug("not this")
    log.info("nor this")
    said = capsys.readouterr()
    assert said.err == "site 3: 100% of it\n"
    assert said.out == "fault: x\n"


def test_every_logger_is_named_by_its_module():
    texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    logging_ = {path for path, text in texts.items() if "getLogger(" in text}
    logging_ = {path for path in logging_ if path.name != "logs.py"}
    assert len(logging_) > 5
    for path in logging_:
        assert "_log = logging.getLogger(__name__)" in texts[path], path


def test_details_are_shown_when_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("FOMOE_LOG", "debug")
    with shown():
        logging.getLogger("fomoe_ext.link").debug("all of it")
    assert capsys.readouterr().err.endswith(" fomoe_ext.link: all of it\n")
    monkeypatch.setenv("FOMOE_LOG", "loud")
    with pytest.raises(ValueError, match="FOMOE_LOG must be one of debug, info, warning, error"):
        wanted_level()
    assert cli.main(["info"]) == 2
    assert "got 'loud'" in capsys.readouterr().err


def test_a_library_user_may_silence_it(caplog):
    Unwritten().note("file", OSError("full"))
    assert caplog.messages == ["fomoe train: could not write file, going on: full"]
    assert caplog.records[0].name == "fomoe_ext.files.unwritten"
    logging.getLogger("fomoe_ext").setLevel(logging.CRITICAL)
    try:
        Unwritten().note("file", OSError("full"))
    finally:
        logging.getLogger("fomoe_ext").setLevel(logging.NOTSET)
    assert len(caplog.messages) == 1


def test_python_shows_warnings_where_nobody_has_asked():
    text = "from fomoe_ext.files.unwritten import Unwritten; Unwritten().note('file', 'full')"
    ran = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    assert ran.stderr == "fomoe train: could not write file, going on: full\n"
    assert ran.stdout == ""


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
            "[127.0.0.1]:40123",
            "Connection closed by peer [127.0.0.1]:40123",
        ),
        ("GLHF! \U0001f3d6\ufe0f Read error [10.0.0.1]: reset", "Read error [10.0.0.1]: reset"),
        (
            "Connection reset by peer\nException raised from recvBytes at Utils.hpp:700\nframe #0",
            "Connection reset by peer",
        ),
        ("caf\u00e9\tx\n\ny", "caf x y"),
        ("", "RuntimeError"),
        ("long " * 100, "long " * 47 + "lo..."),
    ],
)
def test_a_foreign_error_is_one_plain_line(raw, expected, caplog):
    caplog.set_level(logging.DEBUG, "fomoe_ext")
    assert reason_of(RuntimeError(raw)) == expected
    assert raw in caplog.text
    with (
        pytest.raises(PeerLost, match="a test: site 1 lost another site"),
        with_others("a test", 1),
    ):
        raise RuntimeError(f"gloo {raw}")
