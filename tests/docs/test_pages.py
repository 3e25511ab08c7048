"""The commands and snippets on the pages work, and the results that they show are true.

Blocks of Python are executed, in the order of a page, with small stand-ins for names that they do
not define. Commands are parsed by the program that they start, so that a removed flag is found; a
few are run. Marked blocks (<!-- needs: gpu -->, <!-- needs: several machines -->) are not executed,
but their names and flags are looked up.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import forked
import pytest
from pages import BLOCKS, PAGES, ROOT, Block, blocks_of, commands_in, inline_code, read, untested
from small_job import SMALL, environment
from understood import keywords_known, said_of, understood

from fomoe_ext import cli
from fomoe_ext.config.io import read_toml
from fomoe_ext.config.job import SECTIONS, TrainConfig

SHELL = [block for block in BLOCKS if block.language == "sh"]
PYTHON = [block for block in BLOCKS if block.language == "python"]
SCRIPTS = [block for block in PYTHON if block.title]
TOML = [block for block in BLOCKS if block.language == "toml"]
TRAINED = [
    ["fomoe", "train"],
    ["fomoe", "train", "--optimizer", "local-adamw", "--replication", "4"],
    ["fomoe", "train", "--router-scope", "global", "--stale-experts", "4"],
]
"""Jobs of docs/training.md that are run, made smaller; the others are parsed."""


def ids(blocks: list[Block]) -> list[str]:
    return [block.name for block in blocks]


@pytest.mark.parametrize("block", BLOCKS, ids=ids(BLOCKS))
def test_a_block_is_tested_or_says_what_it_needs(block):
    assert not untested(block)


def test_there_is_something_to_test():
    assert len(PAGES) >= 20 and len(PYTHON) >= 9 and len(SHELL) >= 30 and len(TOML) >= 1
    assert len(SCRIPTS) == 1
    assert sum(len(flags_in_the_text(page)) for page in PAGES) >= 20


@pytest.mark.parametrize("block", SHELL, ids=ids(SHELL))
def test_commands_are_understood(block, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FOMOE_SECRET", raising=False)
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples/job.toml", tmp_path / "examples")
    for words in commands_in(block.text):
        understood(words, request.config)
        if words[0] == "fomoe" and words[1] in ("eval", "export", "report", "lighthouse"):
            assert said_of(words) in capsys.readouterr().err


def flags_in_the_text(page: str) -> list[str]:
    """The flags of `fomoe` that a page names outside of its blocks."""
    flags = []
    for code in inline_code(read(page)):
        if re.match(r"fomoe (train|plan|eval|export|report)\b|--", code):
            flags += re.findall(r"(?<!\S)--([a-z][\w-]*)", code)
    return flags


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_the_text_exist(page):
    fields = typing.get_type_hints(TrainConfig)
    known = {f.name for part in SECTIONS for f in dataclasses.fields(fields[part])}
    others = {"preset", "config", "html", "format", "fit", "help"}
    # Of programs in bench, and of torchrun.
    others |= {"quick", "kernels", "clock", "resources", "rdzv_endpoint", "master_port"}
    for flag in flags_in_the_text(page):
        name = flag.replace("-", "_")
        named = {flag, name, name.removeprefix("no_")}
        assert named & (known | others), f"{page}: --{flag}"


@pytest.mark.parametrize("block", TOML, ids=ids(TOML))
def test_configurations_are_read(block, tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(block.text)
    assert read_toml(path)


@pytest.mark.parametrize("words", TRAINED, ids=" ".join)
def test_small_jobs_end_well(words, tmp_path):
    """The page's command with a smaller model and one round."""
    page = [found for b in SHELL if b.page == "docs/training.md" for found in commands_in(b.text)]
    assert words in page
    small = [*SMALL[:-4], "--rounds", "1", "--local-steps", "2", "--eval-rounds", "0"]
    where = ["--run-dir", str(tmp_path / "run"), "--no-tensorboard"]
    result = forked.train(*words[2:], *small, *where, env=environment())
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run/report.md").is_file()


# ---- Python --------------------------------------------------------------------------------------


def _readme(index: int, folder: Path, run: Path) -> dict[str, Any]:
    from hf_models import EXPERTS, make_model

    from fomoe_ext import Placement

    model = make_model("olmoe")
    one = Placement.cyclic(num_sites=1, num_experts=EXPERTS, num_layers=3, replication=1)
    names = {"placement": one, "site": 0, "model": model, "folder": folder / "merged"}
    if index != 1:
        return names if index else {}
    from torch import optim

    from fomoe_ext import hf

    hf.convert(model)
    steps = {"rounds": 2, "train_some_steps": lambda model, optimizer: optimizer.step()}
    return names | steps | {"optimizer": optim.SGD(model.parameters(), lr=0.1)}


def _transformers(index: int, folder: Path, run: Path) -> dict[str, Any]:
    from hf_models import EXPERTS, make_model

    from fomoe_ext import Placement, hf

    one = Placement.cyclic(num_sites=1, num_experts=EXPERTS, num_layers=3, replication=1)
    names = {"placement": one, "site": 0, "out": folder / "out", "folder": folder / "model"}
    if index == 0:
        make_model("olmoe").save_pretrained(folder / "model")
    return names | {"whole": make_model("olmoe"), "hf": hf, "dataset": []}


def _training(index: int, folder: Path, run: Path) -> dict[str, Any]:
    out = folder / "exported"
    assert cli.main(["export", str(run), "--format", "transformers", "--out", str(out)]) == 0
    return {"folder": out}


STAND_INS = {
    "README.md": _readme,
    "docs/training.md": _training,
    "docs/transformers.md": _transformers,
}
"""By page: the names that a block takes for granted, by its number in the page."""


@pytest.fixture(scope="module")
def run() -> Path:
    from small_run import finished_run

    return finished_run()


@pytest.fixture
def alone():
    """torch.distributed with this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("block", PYTHON, ids=ids(PYTHON))
def test_names_and_keywords_exist(block):
    keywords_known(block)


@pytest.mark.parametrize("page", sorted({b.page for b in PYTHON if not b.needs and not b.title}))
def test_python_runs(page, tmp_path, run, alone, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    make = STAND_INS.get(page, lambda *_: {})
    names: dict[str, Any] = {}
    blocks = [b for b in PYTHON if b.page == page and not b.needs and not b.title]
    for index, block in enumerate(blocks):
        names |= make(index, tmp_path, run)
        for part in _paragraphs(block.text) if page == "docs/transformers.md" else [block.text]:
            exec(compile(part, block.name, "exec"), names)
    if page == "README.md":
        assert names["y"].shape == (4, 256, 512)
        assert names["layer"].experts.expand_weight.shape[0] == 32
        assert names["sync"].round == 2 and (tmp_path / "merged/model.safetensors").is_file()
    if page == "docs/transformers.md":
        assert (tmp_path / "out/model.safetensors").is_file()


def _paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


@pytest.mark.parametrize("block", SCRIPTS, ids=ids(SCRIPTS))
def test_scripts_run_as_the_page_says(block, tmp_path):
    (command,) = (
        words
        for other in SHELL
        if other.page == block.page
        for words in commands_in(other.text)
        if words[0] == "torchrun" and words[-1] == block.title
    )
    (tmp_path / block.title).write_text(block.text)
    given = [sys.executable, "-m", "torch.distributed.run", "--standalone", *command[1:]]
    result = subprocess.run(
        given, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    rounds = re.findall(r"^round (\d): loss .* sent (\d+) bytes$", result.stdout, re.M)
    assert [number for number, _ in rounds] == list("123")
    assert all(int(sent) > 1000 for _, sent in rounds), "sites share parameters, not hashes only"


# ---- after a run ---------------------------------------------------------------------------------


def test_commands_on_a_finished_run(run, tmp_path, monkeypatch, capsys):
    """The pages' commands for `runs/<name>` succeed on a finished run."""
    monkeypatch.chdir(tmp_path)
    for name in ("<name>", "<other>"):
        shutil.copytree(run, tmp_path / "runs" / name)
    commands = {
        tuple(words[1:])
        for block in SHELL
        for words in commands_in(block.text)
        if words[0] == "fomoe" and words[1] in ("eval", "export", "report")
    }
    assert len(commands) >= 3
    for words in sorted(commands):
        assert cli.main(words) == 0, capsys.readouterr().err


# ---- numbers -------------------------------------------------------------------------------------


def test_numbers_in_readme_are_those_of_the_study():
    """Every number in README's table is in docs/claims.md, which `python -m bench.study` writes."""
    claims = read("docs/claims.md")
    rows = {
        "gradients at every step": [r"\| DDP \* \|"],
        "fp32 every 16 steps": [r"\| DiLoCo, full replica \* \|", r"\| full replica \|"],
        "4 bits every 4 steps": [r"\| FoMoE, int4 \| 4 \|", r"\| int4, meetings 4 times as often"],
        "experts in turns": [
            r"\| FoMoE, int2, experts in turns \* \| 4 \|",
            r"\| int2, meetings 4 times as often, experts in 4 turns, least-trained",
        ],
    }
    for words, starts in rows.items():
        (row,) = re.findall(rf"^\| [^|\n]*{words}[^|\n]*\|(.*)\|$", read("README.md"), re.M)
        shown = [cell.strip() for cell in row.split("|") if cell.strip() != "-"]
        known = " ".join("".join(re.findall(rf"^{start}.*$", claims, re.M)) for start in starts)
        assert len(shown) >= 2 and all(f" {cell} " in known for cell in shown), (shown, known)


# ---- the checks themselves -----------------------------------------------------------------------


def test_a_block_that_no_test_covers_is_found():
    def said(text: str) -> str:
        return untested(blocks_of(text, "page")[0])

    assert "no known one" in said("```fish\nfomoe train\n```\n")
    assert "its language is sh" in said("```\nfomoe train\n```\n")
    assert "its language is sh" in said("```text\nFOMOE_CUDA=on pip install .\n```\n")
    assert "not one of" in said("<!-- needs: luck -->\n```sh\nfomoe train\n```\n")
    assert not said("<!-- needs: gpu, several machines -->\n```sh\nfomoe train\n```\n")
    assert not said("```text\nbytes sent 3\n```\n")


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("fomoe train --sites 2", "fomoe train --no-such-flag 2"),
        ("fomoe plan --sites 2", "fomoe plan --no-such-flag 2"),
        ("fomoe eval 'runs/<name>'", "fomoe eval 'runs/<name>' --no-such-flag"),
        ("fomoe export 'runs/<name>'", "fomoe export 'runs/<name>' --no-such-flag"),
        ("torchrun -m fomoe_ext.train --sites 2", "torchrun -m fomoe_ext.train --no-such-flag 2"),
        ("torchrun --nnodes 2 own_loop.py", "torchrun --no-such-flag 2 own_loop.py"),
        ("python -m fomoe_ext.train --sites 2", "python -m fomoe_ext.train --no-such-flag 2"),
        ("python -m bench.study all", "python -m bench.study all --no-such-flag"),
        ("pytest bench -q", "pytest bench --no-such-flag"),
        ('pip install ".[docs]"', 'pip install ".[no-such-extra]"'),
        ("mkdocs serve", "mkdocs no-such-word"),
    ],
)
def test_a_removed_flag_is_found(good, bad, request, tmp_path, monkeypatch, capsys):
    """The good command passes, so that what the bad one fails by is its last word alone."""
    monkeypatch.chdir(tmp_path)

    def check(line: str) -> None:
        (words,) = commands_in(line)
        understood(words, request.config)
        if words[:2] in (["fomoe", "eval"], ["fomoe", "export"]):
            assert said_of(words) in capsys.readouterr().err

    check(good)
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(bad)


def test_a_removed_keyword_is_found():
    text = "from fomoe_ext import MoELayer\nMoELayer(8, 8, 4, 2, no_such_word=1)\n"
    with pytest.raises(AssertionError, match="no_such_word"):
        keywords_known(Block("page", 1, "python", None, "", text))
    with pytest.raises(ImportError):
        text = "from fomoe_ext import NoSuchName\n"
        keywords_known(Block("page", 1, "python", None, "", text))


def test_commands_are_split():
    text = "A=1 fomoe train \\\n    --sites 2  # two\nexport B=2\npip install x && fomoe info\n"
    assert commands_in(text) == [
        ["fomoe", "train", "--sites", "2"],
        ["pip", "install", "x"],
        ["fomoe", "info"],
    ]
