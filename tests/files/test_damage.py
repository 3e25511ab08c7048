"""Changed files are detected wherever they are read again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import finished_run, random_model, tiny_config, untrained_run

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.reader import load_global_model
from fomoe_ext.config.data import DataConfig
from fomoe_ext.config.io import dump_config, load_config
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.data.sequences import open_data
from fomoe_ext.eval.command import EvalOptions, evaluate_model
from fomoe_ext.eval.models import load_exported
from fomoe_ext.export.command import ExportOptions, export
from fomoe_ext.export.source import find_source
from fomoe_ext.files.atomic import seal_line, sealed, unseal_line, unsealed
from fomoe_ext.files.states import read_state, write_state
from fomoe_ext.files.tensors import CHECKSUMS, TensorFiles, write_tensors
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.report.measured import measured_coactivation, measured_load
from fomoe_ext.report.metrics import read_metrics
from fomoe_ext.report.runs import find_job, load_run_config

NEWEST = "checkpoints/step-00000024"


def flip(path: Path, at: int = -9) -> None:
    """Changes one bit."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    """Zeros after the header, as in a file whose blocks were never written to the disk."""
    content = path.read_bytes()
    kept = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else 0
    path.write_bytes(content[:kept] + bytes(len(content) - kept))


def edit(old: str, new: str) -> Callable[[Path], None]:
    """Changes the first number of that kind in a text."""

    def change(path: Path) -> None:
        text = path.read_text()
        changed = re.sub(old, new, text, count=1)
        assert changed != text
        path.write_text(changed)

    return change


@pytest.fixture
def run(tmp_path):
    """A copy of a finished run."""
    copied = tmp_path / "run"
    shutil.copytree(finished_run(), copied)
    return copied


def evaluate(run: Path, **options) -> dict:
    return evaluate_model(EvalOptions(run, max_tokens=64, device="cpu", **options))


# ---- a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, change",
    [
        ("model-00001-of-00002.safetensors", flip),
        ("model-00002-of-00002.safetensors", zero),
        ("model.safetensors.index.json", edit("model-00001-of", "model-00002-of")),
    ],
    ids=["flipped", "zeros", "index"],
)
@pytest.mark.parametrize("door", ["eval", "eval a site", "export", "model"])
def test_damaged_weights(run, file, change, door):
    damaged = run / NEWEST / file
    change(damaged)
    doors = {
        "eval": lambda: evaluate(run),
        "eval a site": lambda: evaluate(run / NEWEST, site=1),
        "export": lambda: export(find_source(run), ExportOptions(run, format="safetensors")),
        "model": lambda: load_global_model(
            run / NEWEST, LanguageModel(load_config(run / "config.toml").model)
        ),
    }
    with pytest.raises((ValueError, ckpt.CheckpointError), match=f"{re.escape(file)} is damaged"):
        doors[door]()


@pytest.mark.parametrize(
    "file, change, message",
    [
        (f"{NEWEST}/manifest.json", edit(r'"round": 6', '"round": 5'), "manifest.json is damaged"),
        (f"{NEWEST}/state-00000.json", edit(r'"steps": 24', '"steps": 25'), "state-00000.json"),
        ("config.toml", edit(r"text_field = \"text\"", 'text_field = "test"'), "config.toml"),
        ("report.json", edit(r'"tokens": \d', '"tokens": 9'), "report.json"),
    ],
    ids=["manifest", "state", "config", "report"],
)
def test_damaged_facts_of_a_run(run, file, change, message):
    assert evaluate(run / NEWEST, site=0)["round"] == 6
    change(run / file)
    with pytest.raises(ValueError, match=message):
        evaluate(run / NEWEST, site=0)


def test_a_configuration_that_was_edited_by_hand_is_named_and_can_be_taken(run):
    file = run / "config.toml"
    before = load_run_config(run)
    edit(r"inner_lr = [0-9.]+", "inner_lr = 0.25")(file)
    for read in (lambda: load_run_config(run), lambda: find_job(["--resume", str(run)])):
        with pytest.raises(ValueError, match=r"damaged or was changed by hand.*its first line"):
            read()
    # Given as a user's own file, it may have any content.
    assert load_config(file).inner.inner_lr == 0.25 != before.inner.inner_lr
    file.write_text(file.read_text().partition("\n")[2])
    assert find_job(["--resume", str(run)]).config.inner.inner_lr == 0.25


def test_damaged_statistics_are_not_planned_with(run):
    measured_load(run), measured_coactivation(run)
    edit(r'"load": \[\[\d', '"load": [[9')(run / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line \d+: it is damaged"):
        measured_load(run)
    edit(r'(?s)"coactivation": \[(\s*)\[(\s*)\[(\s*)\d', r'"coactivation": [\1[\2[\g<3>9')(
        run / "report.json"
    )
    with pytest.raises(ValueError, match=r"report.json is damaged"):
        measured_coactivation(run)


def test_another_tokenizer_than_the_runs(tmp_path):
    words = pytest.importorskip("tokenizers")
    file = tmp_path / "words.json"
    vocab = {"[UNK]": 0, "a": 1, "b": 2}
    words.Tokenizer(words.models.WordLevel(vocab, "[UNK]")).save(str(file))
    config = TrainConfig(data=DataConfig(tokenizer=file))
    run = untrained_run(
        tmp_path / "run",
        random_model(tiny_config()),
        config=config,
        meta={"tokenizer": ckpt.sha256(file)},
    )
    assert find_source(run).tokenizer(None) == file
    words.Tokenizer(words.models.WordLevel({"[UNK]": 0, "b": 1, "a": 2}, "[UNK]")).save(str(file))
    with pytest.raises(ValueError, match=r"tokenizer must be the one .* got .*words.json"):
        find_source(run).tokenizer(None)
    assert find_source(run).tokenizer(file) == file


# ---- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, change",
    [
        ("train.bin", zero),
        ("val.bin", flip),
        ("meta.json", edit(r'"bytes": \d', '"bytes": 9')),
        ("meta.json", Path.unlink),
    ],
    ids=["zeros", "flipped", "counts", "no counts"],
)
def test_a_damaged_token_cache(tmp_path, file, change):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("some words and more of them, " * 40)
    paths, cache = [str(tmp_path / "text")], tmp_path / "cache"
    first = open_data(paths, 16, cache_dir=cache)
    assert open_data(paths, 16, cache_dir=cache).content_hash == first.content_hash
    (folder,) = cache.iterdir()
    change(folder / file)
    with pytest.raises(ValueError, match=rf"token cache .* is damaged \(.*{file}\): delete it"):
        open_data(paths, 16, cache_dir=cache)


# ---- exported folders ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = untrained_run(folder / "run", random_model(tiny_config()))
    for form in ("safetensors", "transformers"):
        options = ExportOptions(checkpoint, format=form, out=folder / form, shard_bytes=20000)
        export(find_source(checkpoint), options)
    return folder


@pytest.mark.parametrize(
    "form, pattern, change, message",
    [
        ("safetensors", "model-00001-of-*", flip, "weight is damaged or was changed"),
        ("transformers", "model-00002-of-*", zero, "weight is damaged or was changed"),
        ("safetensors", "config.toml", edit("top_k = 2", "top_k = 3"), "config.toml is damaged"),
        ("transformers", "config.json", edit('_tok": 2', '_tok": 3'), "config.json is damaged"),
        ("transformers", CHECKSUMS, edit(r": \"\w{4}", ': "aaaa'), f"{CHECKSUMS} is damaged"),
    ],
)
def test_a_damaged_export(exported, tmp_path, form, pattern, change, message):
    folder = tmp_path / "copy"
    shutil.copytree(exported / form, folder)
    load_exported(folder)
    (file,) = folder.glob(pattern)
    change(file)
    with pytest.raises(ValueError, match=message):
        load_exported(folder)
    if pattern != CHECKSUMS:  # who has changed it says so
        (folder / CHECKSUMS).unlink()
        load_exported(folder)


def test_single_rows_are_checked_by_themselves(tmp_path):
    stack = torch.randn(3, 4, 5)
    write_tensors(tmp_path, [("stack", stack), ("flat", torch.randn(4, 5))], 1 << 20)
    file = tmp_path / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    begin = json.loads(file.read_bytes()[8:header])["stack"]["data_offsets"][0]
    flip(file, header + begin + 25 * 4)  # in row 1
    files = TensorFiles(tmp_path)
    assert torch.equal(files.read("stack", 0), stack[0])
    assert torch.equal(files.read("stack", 2), stack[2])
    for row in (1, None):
        with pytest.raises(ValueError, match="stack is damaged or was changed"):
            files.read("stack", row)


# ---- what seals are made of ----------------------------------------------------------------------


def test_a_state_file(tmp_path):
    path = tmp_path / "state.safetensors"
    state = {"a": {"b": torch.arange(4.0), "empty": torch.zeros(0)}, "n": 3}
    write_state(path, state)
    assert torch.equal(read_state(path)["a"]["b"], state["a"]["b"])
    for change in (lambda p: flip(p, -2), zero, edit_header):
        write_state(path, state)
        change(path)
        with pytest.raises(ValueError, match=r"state.safetensors must be a state file"):
            read_state(path)


def edit_header(path: Path) -> None:
    content = path.read_bytes()
    assert content.count(b'\\"n\\": 3') == 1
    path.write_bytes(content.replace(b'\\"n\\": 3', b'\\"n\\": 4'))


def test_seals():
    value = {"b": [1.5, None], "a": {"7": "text"}}
    assert unsealed(sealed(value), "x") == value == unsealed(dict(value), "x")
    assert unsealed(json.loads(json.dumps(sealed(value), indent=3)), "x") == value
    with pytest.raises(ValueError, match="x is damaged"):
        unsealed({**sealed(value), "c": 1}, "x")
    with pytest.raises(ValueError, match="x must hold a JSON object"):
        unsealed([1], "x")
    line = json.dumps({"kind": "a", "v": 1})
    assert unseal_line(seal_line(line)) == line == unseal_line(line)
    with pytest.raises(ValueError, match="it is damaged"):
        unseal_line(seal_line(line).replace('"v": 1', '"v": 2'))


def test_lines_of_an_earlier_version_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "round"}\n' + seal_line('{"kind": "x"}'))
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "round"}, {"kind": "x"}]
    (tmp_path / "config.toml").write_text(dump_config(TrainConfig()))
    assert load_run_config(tmp_path) == TrainConfig()
