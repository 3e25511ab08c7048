"""What the README tells people to type is what the package understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from unbuilt import run_in_clone

from fomoe_ext import cli
from fomoe_ext.config_io import parse_args

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^fomoe .*$", README, re.MULTILINE)


def test_python_runs():
    names: dict = {}
    exec(CODE[0], names)
    assert names["y"].shape == (4, 256, 512)
    assert names["layer"].experts.expand_weight.shape[0] == 32


def test_python_of_transformers_models_runs(tmp_path):
    """Line by line, with the names that it takes for granted; `convert` twice needs two models."""
    pytest.importorskip("transformers")
    from hf_models import EXPERTS, make_model

    from fomoe_ext import Placement, hf

    model, folder, out = make_model("olmoe"), tmp_path / "model", tmp_path / "out"
    model.save_pretrained(folder)
    names = {"model": model, "folder": folder, "out": out, "site": 0}
    names["placement"] = Placement.cyclic(1, EXPERTS, 3, 1)
    for line in CODE[1].splitlines():
        exec(line, names)
        if line.startswith("hf.convert(model)"):
            hf.restore(model)
    assert (out / "model.safetensors").is_file() and names["loaded"].bytes_read > 0


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_exist(command, tmp_path, monkeypatch, capsys):
    words = shlex.split(command, comments=True)
    assert words[1] in ("train", "plan", "info", "eval", "export", "lighthouse")
    if words[1] == "lighthouse":
        monkeypatch.delenv("FOMOE_SECRET", raising=False)
        assert cli.main(words[1:]) == 2  # every flag is known; it has no secret
        assert "FOMOE_SECRET" in capsys.readouterr().err
        return
    if words[1] == "info":
        assert len(words) == 2
        return
    if words[1] in ("eval", "export"):
        assert cli.main(words[1:]) == 2  # every flag is known; there is no such run
        assert "runs/<name>" in capsys.readouterr().err
        return
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text("[run]\nrounds = 3\n")
    if words[1] == "plan":
        assert cli.main(words[1:]) == 0
        return
    config = parse_args(words[2:])
    stated = words[words.index("--sites") + 1] if "--sites" in words else "4"
    assert config.sites.sites == int(stated)


def test_ci_runs_the_tests_as_people_do():
    (command,) = re.findall(r"^pytest.*$", README, re.MULTILINE)
    script = (Path(__file__).parent.parent / ".ci/run").read_text(encoding="utf-8")
    assert re.findall(r"^pytest.*$", script, re.MULTILINE) == [command]


def test_there_is_something_to_test():
    assert len(CODE) == 2 and len(COMMANDS) >= 7


@pytest.mark.parametrize("module", ["bench.study", "tests.fuzz.run", "tests.chaos.soak"])
def test_what_python_starts_finds_an_installed_package(module, tmp_path):
    """In a clone that nothing was built in, which `python -m` puts first."""
    folder = "/".join(module.split(".")[:2])
    result = run_in_clone(tmp_path, folder, "-m", module, "--help")
    assert result.returncode == 0, result.stderr
    assert f"python -m {module}" in result.stdout
