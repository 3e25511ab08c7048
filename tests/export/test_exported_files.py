"""The files that `fomoe export` writes, and what it refuses by name."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exported_model import global_model, load, write
from safetensors import safe_open
from safetensors.torch import load_file
from small_run import finished_run, random_model, tiny_config, untrained_run

from fomoe_ext import cli
from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.reader import GlobalModelReader
from fomoe_ext.config.io import load_config
from fomoe_ext.export.format import model_of_config, transformers_config
from fomoe_ext.files import tensors as tensor_files

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- files ---------------------------------------------------------------------------------------


def test_shards_are_small_and_hold_everything_once(tmp_path):
    model = random_model(tiny_config())
    source = untrained_run(tmp_path, model)
    one = write(source, tmp_path / "one")
    limit = 5000
    many = write(source, tmp_path / "many", "--shard-bytes", str(limit))
    files = sorted(many.glob("*.safetensors"))
    assert len(files) > 4 and files[-1].name.endswith(f"-of-{len(files):05d}.safetensors")
    whole, parts, total = load_file(one / "model.safetensors"), {}, 0
    for file in files:
        part = load_file(file)
        size = sum(value.nbytes for value in part.values())
        assert size <= limit or len(part) == 1
        assert not parts.keys() & part.keys()
        parts |= part
        total += size
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert {many / name for name in index["weight_map"].values()} == set(files)
    for name, value in load(many).state_dict().items():
        assert torch.equal(value, whole[name.replace("lm_head", "model.embedding")])


def test_tensors_are_read_one_by_one(tmp_path, monkeypatch):
    """At any time, only the tensors of the shard being written are in memory."""
    source = untrained_run(tmp_path, random_model(tiny_config()))
    alive, most = 0, 0
    read, save = GlobalModelReader.tensor, tensor_files.save_file

    def counted(self, name):
        nonlocal alive, most
        value = read(self, name)
        alive += value.nbytes
        most = max(most, alive)
        return value

    def saved(tensors, *arguments, **options):
        nonlocal alive
        save(tensors, *arguments, **options)
        alive -= sum(value.nbytes for value in tensors.values())

    monkeypatch.setattr(GlobalModelReader, "tensor", counted)
    monkeypatch.setattr(tensor_files, "save_file", saved)
    write(source, tmp_path / "out", "--shard-bytes", "4000")
    largest = 256 * 16 * 4  # the embedding
    assert alive == 0 and most <= 4000 + largest


def test_plain_safetensors_hold_the_bits_of_the_checkpoint(tmp_path):
    run = finished_run()
    out = write(run, tmp_path / "out", "--format", "safetensors")
    tensors = load_file(out / "model.safetensors")
    with GlobalModelReader(ckpt.list_checkpoints(run / "checkpoints")[-1]) as reader:
        assert set(reader.names()) == tensors.keys()
        assert all(torch.equal(reader.tensor(name), value) for name, value in tensors.items())
    config = load_config(out / "config.toml")
    trained_as = load_config(run / "config.toml")
    assert config.model == trained_as.model and config.inner == trained_as.inner
    assert config.run.run_dir is None and config.data.cache_dir is None
    names = ["checksums.json", "config.toml", "model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names


@pytest.mark.parametrize("form", ["transformers", "safetensors"])
def test_trust_remote_code_is_explained_if_code_is_written(form, tmp_path, capsys):
    out = write(finished_run(), tmp_path / "out", "--format", form)
    said = capsys.readouterr().out
    assert ("from_pretrained(folder, trust_remote_code=True)" in said) == (form == "transformers")
    if form == "transformers":
        card = (out / "README.md").read_text()
        assert "`trust_remote_code=True` is required" in card and "`modeling_fomoe.py`" in card


def test_the_card_tells_the_runs_facts(trained):
    card = (trained[2] / "README.md").read_text()
    report = json.loads((finished_run() / "report.json").read_text())
    assert "| rounds | 6 of 4 local steps |" in card
    assert "| sites | 2 |" in card and "each expert on 1 of the sites" in card
    assert f"{report['validation']['loss']:.4f} nats/token" in card


def test_default_output_folder(tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run(), run)
    assert cli.main(["export", str(run), "--checkpoint", "step-00000012"]) == 0
    said = capsys.readouterr().out
    assert "exported-transformers" in said and "step-00000012, round 3" in said
    assert "not measured at this round" in (run / "exported-transformers/README.md").read_text()
    with safe_open(run / "exported-transformers/model.safetensors", "pt") as file:
        found = file.get_tensor("model.embedding.weight")
    wanted = global_model(run / "checkpoints/step-00000012").embedding
    assert torch.equal(found, wanted)


# ---- what is wrong is named ----------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A copy of the run to spoil."""
    return Path(shutil.copytree(finished_run(), tmp_path / "run"))


def refused(capsys, *arguments: str) -> str:
    """The error message of `fomoe export`, which must fail."""
    assert cli.main(["export", *arguments]) == 2
    return capsys.readouterr().err


def test_files_of_another_machine_are_named_with_their_site(run, tmp_path, capsys):
    for checkpoint in ckpt.list_checkpoints(run / "checkpoints"):
        for name, entry in ckpt.read_manifest(checkpoint).files.items():
            if entry.site == 1:
                (checkpoint / name).unlink()
    said = refused(capsys, str(run), "--out", str(tmp_path / "out"))
    assert "step-00000024 lacks model-00002-of-00002.safetensors (written by site 1)" in said
    assert "copy all files into this folder" in said
    assert not (tmp_path / "out").exists()


def test_states_of_sites_are_not_needed(run, tmp_path):
    for checkpoint in ckpt.list_checkpoints(run / "checkpoints"):
        shutil.rmtree(checkpoint / ckpt.TRAINING)
        states = list(checkpoint.glob("state-*.json"))
        assert len(states) == 2
        for state in states:
            state.unlink()
    write(run, tmp_path / "out")


def test_an_older_checkpoint_is_taken_when_the_newest_is_not_whole(run, tmp_path, capsys):
    broken = run / "checkpoints/step-00000024/model-00001-of-00002.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    write(run, tmp_path / "out")
    said = capsys.readouterr().out
    assert "using an older checkpoint" in said and "must have" in said
    assert "step-00000012, round 3" in said
    said = refused(
        capsys, str(run), "--checkpoint", "step-00000024", "--out", str(tmp_path / "two")
    )
    assert "model-00001-of-00002.safetensors must have" in said


def test_damaged_content_is_refused_and_nothing_is_left(run, tmp_path, capsys):
    file = run / "checkpoints/step-00000024/model-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    said = refused(capsys, str(run), "--out", str(tmp_path / "new/out"))
    assert "the content of model-00002-of-00002.safetensors is damaged" in said
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    write(run, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "is not empty" in refused(capsys, str(run), "--out", str(tmp_path / "out"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "file").write_text("")
    assert "got the file" in refused(capsys, str(run), "--out", str(tmp_path / "file"))


def test_other_bad_arguments(run, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert "missing does not exist" in refused(capsys, str(tmp_path / "missing"), *out)
    assert "run must be a run folder" in refused(capsys, str(tmp_path), *out)
    assert "step-7 does not exist" in refused(capsys, str(run), "--checkpoint", "step-7", *out)
    alone = run / "checkpoints/step-00000012"
    assert "checkpoint must not be given for a checkpoint's own folder" in refused(
        capsys, str(alone), "--checkpoint", "x", *out
    )
    moved = shutil.copytree(alone, tmp_path / "alone")
    assert "out must be given" in refused(capsys, str(moved))
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint" in refused(capsys, str(run), *out)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(run), "--format", "gguf"])
    assert stopped.value.code == 2


def test_a_lone_checkpoint_of_an_unknown_tokenizer(tmp_path, capsys):
    path = untrained_run(tmp_path, random_model(tiny_config(vocab_size=300)))
    assert "--tokenizer must be given" in refused(capsys, str(path), "--out", str(tmp_path / "out"))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    path = untrained_run(tmp_path, random_model(tiny_config()))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]  # else it would be damaged
    for field, value, message in (
        ("num_layers", 3, "must have the tensors of its model"),
        ("intermediate_size", 12, "must have shape"),
        ("expert_size", 12, "unknown key 'expert_size'; it is called 'intermediate_size' now"),
        ("colour", 1, "must have a valid description of its model"),
    ):
        changed = {**manifest, "meta": {"model": {**manifest["meta"]["model"], field: value}}}
        (path / "manifest.json").write_text(json.dumps(changed))
        assert message in refused(capsys, str(path), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch():
    code = (
        "import sys; from fomoe_ext import cli; cli.main(['--help']); print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert "export" in result.stdout and "eval" in result.stdout
    assert result.stdout.endswith("False\n"), result.stderr


def test_old_names_of_options_are_refused_with_the_new_ones():
    written = transformers_config(tiny_config(), "bytes", 0, "float32")
    for old, new in {"scoring": "router_scoring", "expert_size": "moe_intermediate_size"}.items():
        before = {old if name == new else name: value for name, value in written.items()}
        with pytest.raises(ValueError, match=f"unknown key '{old}'; it is called '{new}' now"):
            model_of_config(before)


def test_every_field_of_the_model_has_a_place():
    """A new field of ModelConfig must be exported or listed as used in training only."""
    config = tiny_config(
        top_k=3, router_num_groups=2, router_groups_kept=2, norm="rms", rope_base=77.0
    )
    written = transformers_config(config, "bytes", 0, "float32")
    assert model_of_config(written) == dataclasses.replace(config, balance="none")
    from fomoe_ext.export.exported.configuration_fomoe import FomoeConfig

    fields = inspect.signature(FomoeConfig).parameters
    common = {"architectures", "auto_map", "dtype", "eos_token_id", "model_type", "pad_token_id"}
    assert written.keys() - common <= fields.keys()
