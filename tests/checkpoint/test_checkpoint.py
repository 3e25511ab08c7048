"""Checkpoints and validation of the global model, by sites that each hold only some experts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from sites import pool

from fomoe_ext.checkpoint import file_writer, writer
from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.reader import (
    GlobalModelReader,
    load_global_model,
    load_state,
    load_tensors,
    tensor_names,
)
from fomoe_ext.checkpoint.whole import newest_whole, require_whole
from fomoe_ext.config.model import ModelConfig
from fomoe_ext.data.sequences import open_data
from fomoe_ext.files.tensors import INDEX
from fomoe_ext.layer.assemble import local_tensors, own_global_tensors
from fomoe_ext.model.evaluate import evaluate, global_experts
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.placement import Placement

CONFIG = ModelConfig(
    vocab_size=256,
    seq_len=16,
    hidden_size=12,
    num_layers=2,
    num_heads=2,
    num_experts=6,
    intermediate_size=5,
    top_k=2,
    activation="clamped_swiglu",
    expert_bias=True,
)


def place(num_sites: int, replication: int) -> Placement:
    return Placement.cyclic(
        num_sites=num_sites,
        num_experts=CONFIG.num_experts,
        num_layers=CONFIG.num_layers,
        replication=replication,
    )


def site_model(num_sites: int, replication: int, site: int) -> LanguageModel:
    return with_biases(LanguageModel(CONFIG, place(num_sites, replication), site, seed=3))


def full_model() -> LanguageModel:
    """The same model with all experts: initial weights do not depend on the placement."""
    return with_biases(LanguageModel(CONFIG, seed=3))


@torch.no_grad()
def with_biases(model: LanguageModel) -> LanguageModel:
    """Biases that depend on layer and expert, instead of zeros."""
    for index, layer in enumerate(model.moe_layers()):
        for expert in layer.experts.resident_experts:
            _, _, *biases = layer.experts.expert_weights(expert)
            for part, bias in enumerate(biases):
                bias += torch.linspace(-1, 1 + part, bias.numel()) * (1 + expert - 3 * index)
    return model


def save(
    site: int,
    num_sites: int,
    replication: int,
    folder: Path,
    failing: int = -1,
    shard_bytes: int = 1 << 30,
) -> str:
    """Writes a checkpoint; the state of site `failing` cannot be written."""
    model, placement = site_model(num_sites, replication, site), place(num_sites, replication)
    if site == failing:
        file_writer.write_text = lambda *a, **k: (_ for _ in ()).throw(OSError("no space left"))
    try:
        path = writer.save_checkpoint(
            folder,
            ckpt.checkpoint_name(7),
            own_global_tensors(model, placement, site, local_tensors(model)),
            {"site": site, "values": [site, site + 1, site + 2]},
            site=site,
            num_sites=num_sites,
            round=2,
            meta={"job": "test"},
            named={f"site{site}/x": torch.arange(3) + site, "of all": torch.ones(2)},
            shard_bytes=shard_bytes,
        )
    except ckpt.CheckpointError as error:
        return str(error)
    finally:
        if site == failing:
            from fomoe_ext.files.atomic import write_text

            file_writer.write_text = write_text
    return path.name


@pytest.mark.parametrize("num_sites, replication", [(1, 1), (2, 1), (3, 2), (3, 3)])
def test_the_global_model_comes_back(tmp_path, num_sites, replication):
    """Sites with some experts write it; a site with all and a site with other experts read it."""
    answers = pool().run(num_sites, save, replication, tmp_path)
    assert answers == ["step-00000007"] * num_sites
    path = tmp_path / "step-00000007"
    require_whole(path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]
    wanted = full_model().state_dict()

    other = LanguageModel(CONFIG, seed=4)
    load_global_model(path, other)
    assert other.state_dict().keys() == wanted.keys()
    for name, value in other.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    part = LanguageModel(CONFIG, place(3, 1), 1, seed=4)
    load_global_model(path, part)
    reference = site_model(3, 1, 1)
    for name, value in part.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name
    tensors = {f"site{site}/x": torch.empty(3, dtype=torch.int64) for site in range(num_sites)}
    assert tensor_names(path) == {"of all": (2,)} | dict.fromkeys(tensors, (3,))
    load_tensors(path, tensors)
    for site in range(num_sites):
        assert load_state(path, site)["values"] == [site, site + 1, site + 2]
        assert tensors[f"site{site}/x"].tolist() == [site, site + 1, site + 2]


def test_shards_are_small_and_complete(tmp_path):
    """Files keep to the size limit; every tensor is in exactly one file and written by one site."""
    pool().run(2, save, 2, tmp_path, -1, 2000)
    path = tmp_path / "step-00000007"
    files = sorted(path.glob("model-*.safetensors"))
    assert len(files) > 8
    index = json.loads((path / INDEX).read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    held = [name for file in files for name in safe_open(file, framework="pt").keys()]  # noqa: SIM118
    assert sorted(held) == sorted(index["weight_map"])
    manifest = ckpt.read_manifest(path)
    writers = {manifest.files[file.name].site for file in files}
    assert writers == {0, 1}
    load_global_model(path, model := LanguageModel(CONFIG, seed=4))
    for name, value in full_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_site_that_cannot_write_leaves_the_old_checkpoint(tmp_path):
    pool().run(2, save, 1, tmp_path)
    before = contents(tmp_path / "step-00000007")
    answers = pool().run(2, save, 1, tmp_path, 1)
    for answer in answers:
        assert "could not write" in answer and "site 1: no space left" in answer
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]
    assert contents(tmp_path / "step-00000007") == before


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("manifest.json", Path.unlink, "has no manifest.json: it is not whole"),
        ("manifest.json", truncate, "manifest.json is damaged"),
        ("model.safetensors.index.json", Path.unlink, "cannot read model.safetensors.index.json"),
        ("model-00001-of-00002.safetensors", Path.unlink, "lacks model-00001-of-00002"),
        (
            "model-00002-of-00002.safetensors",
            truncate,
            "00002-of-00002.safetensors must have .* bytes",
        ),
        ("state-00001.json", flip, "the content of state-00001.json is damaged"),
        ("state-00001.json", Path.unlink, "lacks state-00001.json"),
    ],
)
def test_damage_is_found_and_named(tmp_path, name, damage, message):
    pool().run(2, save, 1, tmp_path)
    path = tmp_path / "step-00000007"
    damage(path / name)
    with pytest.raises(ckpt.CheckpointError, match=message):
        load_state(path, 1)
        load_global_model(path, full_model())


def test_other_models_and_sites_are_refused(tmp_path):
    pool().run(2, save, 1, tmp_path)
    path = tmp_path / "step-00000007"
    with pytest.raises(ckpt.CheckpointError, match="has 2 sites and no state of site 2"):
        load_state(path, 2)
    with pytest.raises(ckpt.CheckpointError, match="is of another model"):
        more = ModelConfig(**{**vars(CONFIG), "num_experts": 8})
        load_global_model(path, LanguageModel(more))
    with pytest.raises(ckpt.CheckpointError, match="does not exist"):
        ckpt.read_manifest(tmp_path / "step-00000008")
    with (
        GlobalModelReader(path) as reader,
        pytest.raises(ckpt.CheckpointError, match="no ten"),
    ):
        reader.tensor("nothing")


def test_the_newest_whole_checkpoint_is_chosen(tmp_path):
    pool().run(2, save, 1, tmp_path)
    newer = tmp_path / ckpt.checkpoint_name(8)
    shutil.copytree(tmp_path / ckpt.checkpoint_name(7), newer)
    assert newest_whole(tmp_path) == (newer, [])
    flip(newer / "model-00001-of-00002.safetensors")
    path, skipped = newest_whole(tmp_path)
    assert path == tmp_path / ckpt.checkpoint_name(7)
    (reason,) = skipped
    assert "step-00000008: the content of model-00001-of-00002.safetensors is damaged" in reason
    assert newest_whole(tmp_path, content=False).path == newer
    # Three processes that see the folder check a third of the files each; one finds the damage.
    found = [newest_whole(tmp_path, share=(i, 3)).path for i in range(3)]
    assert found.count(newer) == 2
    os.truncate(newer / "state-00000.json", 5)
    path, skipped = newest_whole(tmp_path, content=False)
    assert path == tmp_path / ckpt.checkpoint_name(7)
    assert "state-00000.json must have" in skipped[0]
    assert newest_whole(tmp_path / "nothing") == (None, [])


# ---- validation ----------------------------------------------------------------------------------


def validate(
    site: int, num_sites: int, replication: int, folder: Path, buffer_bytes: int
) -> tuple[Any, ...]:
    model = site_model(num_sites, replication, site)
    with torch.no_grad():  # rows of experts that are elsewhere, which the global model does not use
        for layer in model.moe_layers():
            absent = layer.experts.resident_index < 0
            layer.router.weight[absent] = 100.0 + site
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = open_data([str(folder / "*.txt")], CONFIG.seq_len, cache_dir=folder / "cache")
    result = evaluate(
        model,
        data,
        place(num_sites, replication),
        site,
        max_tokens=700,
        batch_size=2,
        buffer_bytes=buffer_bytes,
    )
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return (
        result.loss,
        result.tokens,
        result.load.tolist(),
        result.bytes_sent,
        data.bits_per_byte(1),
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        words = " ".join(str(n * (i + 3) ** 3 % 9973) for n in range(300))
        (folder / f"{i}.txt").write_text(words)
    open_data([str(folder / "*.txt")], CONFIG.seq_len, cache_dir=folder / "cache")
    return folder


@pytest.mark.parametrize("buffer_bytes", [1, 1 << 20])
def test_the_global_model_of_one_site_is_its_own(buffer_bytes):
    """It uses the layers' own weights, biases and activation."""
    model = full_model().eval()
    tokens = torch.arange(2 * CONFIG.seq_len).view(2, -1)
    with torch.no_grad():
        wanted = model(tokens)
        with global_experts(model, place(1, 1), 0, buffer_bytes):
            torch.testing.assert_close(model(tokens), wanted)


@pytest.mark.parametrize("num_sites, replication", [(2, 1), (3, 1), (3, 2), (4, 2), (2, 2)])
@pytest.mark.parametrize("buffer_bytes", [1, 1 << 20])
def test_validation_is_that_of_a_full_replica(texts, num_sites, replication, buffer_bytes):
    """The loss, tokens and load are the same whether experts are read one by one or all at once."""
    (whole,) = pool().run(1, validate, 1, texts, 1 << 20)
    answers = pool().run(num_sites, validate, replication, texts, buffer_bytes)
    for loss, tokens, load, sent, _ in answers:
        assert loss == pytest.approx(whole[0], rel=1e-6)
        assert (tokens, load) == whole[1:3]
        assert (sent > 0) == (replication < num_sites)
    assert sum(map(sum, whole[2])) == CONFIG.num_layers * CONFIG.top_k * whole[1]


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    entry = {"site": 0, "size": 1, "sha256": "0" * 64, "rank": 0, "header_sha256": ""}
    manifest = {"format": ckpt.FORMAT, "round": 1, "num_sites": 1, "ranks_per_site": 1, "meta": {}}
    manifest["files"] = {"training/" + "1" * 5000: entry}
    (tmp_path / ckpt.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ckpt.CheckpointError, match="File name too long"):
        require_whole(tmp_path)
