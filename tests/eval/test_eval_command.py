"""`fomoe eval`: losses of a run, of skipped experts, and of exported and transformers' models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_run import finished_run, random_model, tiny_config, untrained_run

from fomoe_ext import cli
from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.reader import GlobalModelReader, load_global_model
from fomoe_ext.config.data import DataConfig
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.sites import SitesConfig
from fomoe_ext.eval.models import load_exported
from fomoe_ext.export import tokenizer as of_exports
from fomoe_ext.export.source import find_source
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.placement import Placement

pytestmark = pytest.mark.usefixtures("one_thread")


def evaluate(folder: Path, model: Path, *flags: str) -> dict:
    """The figures that `fomoe eval` prints; fails unless it succeeds."""
    figures = folder / "figures/eval.json"
    assert cli.main(["eval", str(model), "--json", str(figures), *flags]) == 0
    return json.loads(figures.read_text())


def losses(figures: dict) -> dict[str, float]:
    return {result["name"]: result["loss"] for result in figures["results"]}


def refused(capsys, *arguments: str) -> str:
    """The error message of `fomoe eval`, which must fail."""
    assert cli.main(["eval", *arguments]) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of text to evaluate on."""
    file = tmp_path_factory.mktemp("text") / "some.txt"
    file.write_text("".join(f"the {i * i % 17}th line, é\n" for i in range(60)))
    return file


def by_hand(model: LanguageModel, file: Path) -> float:
    """Nats per token of a text of bytes, in windows of 24 tokens, computed one by one."""
    tokens = [*file.read_bytes(), 0]
    starts = range(0, len(tokens) - 24, 24)
    windows = torch.tensor([tokens[start : start + 25] for start in starts])
    with torch.no_grad():
        logits = model(windows[:, :-1])
    return float(F.cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten()))


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_has_the_loss_of_its_report(tmp_path, capsys):
    run = finished_run()
    report = json.loads((run / "report.json").read_text())
    figures = evaluate(tmp_path, run)
    table = capsys.readouterr().out
    whole, *sites = figures["results"]
    assert whole["loss"] == pytest.approx(report["validation"]["loss"], abs=1e-4)
    assert whole["bits_per_byte"] == pytest.approx(report["validation"]["bits_per_byte"], abs=1e-4)
    assert whole["tokens"] == report["validation"]["tokens"]
    assert whole["perplexity"] == pytest.approx(math.exp(whole["loss"]))
    assert whole["skipped_share"] == 0 and figures["round"] == 6
    assert [site["name"] for site in sites] == ["site 0 alone", "site 1 alone"]
    # What one skips the other holds.
    assert sum(site["skipped_share"] for site in sites) == pytest.approx(1, abs=0.2)
    for result in figures["results"]:
        assert f"{result['loss']:.4f}" in table
    assert f"{sites[0]['loss'] - whole['loss']:+.4f}" in table


def test_a_site_alone_is_the_global_model_less_the_absent_experts(tmp_path):
    run = finished_run()
    figures = evaluate(tmp_path, run, "--max-tokens", "640")
    checkpoint = Path(figures["checkpoint"])
    source = find_source(checkpoint)
    placement = Placement.cyclic(num_sites=2, num_experts=8, num_layers=2, replication=1)
    for site in range(2):
        model = LanguageModel(source.model)
        load_global_model(checkpoint, model)
        with torch.no_grad():
            for index, layer in enumerate(model.moe_layers()):
                absent = [e for e in range(8) if e not in placement.resident(index, site)]
                assert len(absent) == 4
                layer.experts.contract_weight[absent] = 0
        lone = write_plain(tmp_path / f"site-{site}", model)
        where = ["--data", str(run.parent / "text/*.py"), "--max-tokens", "640"]
        (wanted,) = losses(evaluate(tmp_path, lone, *where)).values()
        assert figures["results"][1 + site]["loss"] == pytest.approx(wanted, rel=1e-5)
        assert abs(wanted - figures["results"][0]["loss"]) > 1e-4


def write_plain(folder: Path, model: LanguageModel) -> Path:
    """A folder of `fomoe export --format safetensors` of a model."""
    source = untrained_run(folder / "run", model)
    out = folder / "out"
    arguments = ["export", str(source), "--format", "safetensors", "--out", str(out)]
    assert cli.main(arguments) == 0
    return out


def test_one_site_reads_nothing_of_the_others(tmp_path, monkeypatch):
    read: list[str] = []
    tensor = GlobalModelReader.tensor
    monkeypatch.setattr(
        GlobalModelReader,
        "tensor",
        lambda self, name: read.append(name) or tensor(self, name),
    )
    run = finished_run()
    found = losses(evaluate(tmp_path, run, "--site", "1", "--max-tokens", "640"))
    for index in range(2):
        prefix = f"blocks.{index}.moe.experts."
        experts = {int(n.removeprefix(prefix).partition(".")[0]) for n in read if prefix in n}
        assert experts == set(
            Placement.cyclic(num_sites=2, num_experts=8, num_layers=2, replication=1).resident(
                index, 1
            )
        )
    every = losses(evaluate(tmp_path, run, "--max-tokens", "640"))
    assert found == {"site 1 alone": every["site 1 alone"]}


def test_another_checkpoint(tmp_path):
    run = finished_run()
    early = evaluate(tmp_path, run, "--checkpoint", "step-00000012", "--max-tokens", "640")
    late = evaluate(tmp_path, run, "--max-tokens", "640")
    assert early["round"] == 3
    assert losses(early)["global model"] > losses(late)["global model"]
    alone = evaluate(tmp_path, run / "checkpoints/step-00000012", "--max-tokens", "640")
    assert losses(alone) == losses(early)


def test_the_placement_is_that_of_the_checkpoint(tmp_path, text):
    """With reshuffling the experts a site holds are in the checkpoint, not in the configuration."""
    model = random_model(tiny_config())
    sites = SitesConfig(sites=2, replication=1, placement="random", reshuffle_rounds=1)
    placement = Placement.random(num_sites=2, num_experts=8, num_layers=2, replication=1, seed=9)
    run = untrained_run(
        tmp_path / "run",
        model,
        config=TrainConfig(sites=sites),
        state={"sync": {"placement": placement.to_dict()}},
    )
    found = losses(evaluate(tmp_path, run, "--val-data", str(text), "--site", "1"))
    lone = LanguageModel(model.config, placement, 1)
    load_global_model(run / "checkpoints/step-00000008", lone)
    assert found == {"site 1 alone": pytest.approx(by_hand(lone.eval(), text), rel=1e-5)}


def test_without_a_state_the_placement_is_that_of_the_configuration(tmp_path, text, capsys):
    model = random_model(tiny_config(router_scope="resident"))
    config = TrainConfig(sites=SitesConfig(sites=4, replication=2))
    run = untrained_run(tmp_path / "run", model, config=config)
    (run / "checkpoints/step-00000008/state-00000.json").unlink()
    figures = evaluate(tmp_path, run, "--val-data", str(text))
    assert len(figures["results"]) == 5
    for site, result in enumerate(figures["results"][1:]):
        lone = LanguageModel(
            model.config,
            Placement.cyclic(num_sites=4, num_experts=8, num_layers=2, replication=2),
            site,
        )
        load_global_model(run / "checkpoints/step-00000008", lone)
        assert result["loss"] == pytest.approx(by_hand(lone.eval(), text), rel=1e-5)
        assert result["skipped_share"] == 0  # it chooses among those it holds
    saved = (run / "config.toml").read_text()
    reshuffled = saved.replace('"cyclic"', '"random"').replace(
        "reshuffle_rounds = 0", "reshuffle_rounds = 1"
    )
    assert reshuffled != saved
    (run / "config.toml").write_text(reshuffled)
    assert "changed by hand" in refused(capsys, str(run), "--val-data", str(text))
    (run / "config.toml").write_text(reshuffled.partition("\n")[2])
    assert "must have the state of a site" in refused(capsys, str(run), "--val-data", str(text))


# ---- text ----------------------------------------------------------------------------------------


def test_loss_and_bits_per_byte_of_a_given_text(tmp_path, text):
    model = random_model(tiny_config())
    source = untrained_run(tmp_path / "run", model)
    figures = evaluate(tmp_path, source, "--val-data", str(text), "--skip-experts", "0")
    (result,) = figures["results"]
    size = len(text.read_bytes())
    assert (
        result["tokens"] == size // 24 * 24
    )  # one more than it has bytes, the first not predicted
    assert result["loss"] == pytest.approx(by_hand(model, text), rel=1e-5)
    bits = result["loss"] / math.log(2) * (size + 1) / size
    assert result["bits_per_byte"] == pytest.approx(bits)
    less = evaluate(
        tmp_path, source, "--val-data", str(text), "--skip-experts", "0", "--max-tokens", "100"
    )
    assert less["results"][0]["tokens"] == 96
    single = evaluate(
        tmp_path, source, "--val-data", str(text), "--skip-experts", "0", "--batch-size", "1"
    )
    assert single["results"][0]["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_skipping_a_share_of_the_experts(tmp_path, text):
    model = random_model(tiny_config())
    source = untrained_run(tmp_path / "run", model)

    def at(share: str, *flags: str) -> dict:
        chosen = ["--val-data", str(text), "--skip-experts", share, *flags]
        return evaluate(tmp_path, source, *chosen)["results"][0]

    none, half, all_ = at("0"), at("0.5"), at("1")
    assert none["skipped_share"] == 0 and all_["skipped_share"] == 1
    assert 0.1 < half["skipped_share"] < 0.9
    assert half["name"] == "50% of the experts skipped"
    assert at("0.5")["loss"] == half["loss"] != at("0.5", "--seed", "1")["loss"]
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.experts.contract_weight.zero_()
    assert all_["loss"] == pytest.approx(by_hand(model, text), rel=1e-5)


# ---- exported folders and transformers' models ---------------------------------------------------


@pytest.mark.parametrize("format", ["transformers", "safetensors"])
def test_an_exported_folder_is_the_model(tmp_path, text, format):
    model = random_model(
        tiny_config(expert_bias=True, shared_expert_intermediate_size=4, router_num_groups=2)
    )
    source = untrained_run(tmp_path / "run", model)
    flags = ["--format", format, "--shard-bytes", "6000", "--out", str(tmp_path / "out")]
    assert cli.main(["export", str(source), *flags]) == 0
    loaded = load_exported(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    figures = evaluate(tmp_path, tmp_path / "out", "--val-data", str(text))
    (result,) = figures["results"]
    assert figures["kind"] == "exported"
    assert result["loss"] == pytest.approx(by_hand(model, text), rel=1e-5)


def test_an_exported_folder_brings_its_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(300)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "words.json"))
    model = random_model(tiny_config(vocab_size=300))
    config = TrainConfig(data=DataConfig(tokenizer=tmp_path / "words.json"))
    run = untrained_run(tmp_path / "run", model, config=config)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "words.json").unlink()
    file = tmp_path / "words.txt"
    ids = [7 * i % 300 for i in range(97)]
    file.write_text(" ".join(f"w{i}" for i in ids))
    (result,) = evaluate(tmp_path, tmp_path / "out", "--val-data", str(file))["results"]
    windows = torch.tensor([ids[start : start + 25] for start in range(0, 96, 24)])
    with torch.no_grad():
        wanted = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    assert result["loss"] == pytest.approx(float(wanted), rel=1e-5)
    assert result["tokens"] == 96


def test_a_model_of_transformers(tmp_path, text):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.GPT2Config(vocab_size=256, n_positions=24, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight *= 20  # so that the loss is not that of even odds
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer = json.dumps(of_exports._byte_tokenizer())
    (tmp_path / "gpt2/tokenizer.json").write_text(tokenizer)
    figures = evaluate(tmp_path, tmp_path / "gpt2", "--val-data", str(text))
    (result,) = figures["results"]
    tokens = [*text.read_bytes()]
    starts = range(0, len(tokens) - 24, 24)
    windows = torch.tensor([tokens[start : start + 25] for start in starts])
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert result["loss"] == pytest.approx(float(wanted), rel=1e-5)
    assert figures["kind"] == "transformers" and figures["seq_len"] == 24
    assert result["skipped_share"] is None
    assert abs(result["loss"] - math.log(256)) > 0.05


# ---- what is wrong is named ----------------------------------------------------------------------


def test_bad_arguments_are_named(tmp_path, text, capsys):
    source = untrained_run(tmp_path / "run", random_model(tiny_config()))
    (source / "state-00000.json").unlink()
    given = [str(source), "--val-data", str(text)]
    assert "is not a folder" in refused(capsys, str(tmp_path / "missing"))
    assert "or of a transformers model, got" in refused(capsys, str(tmp_path))
    for flag, value, message in (
        ("--seq-len", "25", "seq_len must be at most the model's 24"),
        ("--site", "0", "must have the state of a site"),
        ("--tokenizer", str(text), "is not a tokenizer.json"),
        ("--checkpoint", "step-1", "checkpoint must not be given for a checkpoint's own folder"),
    ):
        assert message in refused(capsys, *given, flag, value)
    short = tmp_path / "short.txt"
    short.write_text("x")
    assert "val_data must have at least seq_len + 1 = 25 tokens, got 2" in refused(
        capsys, str(source), "--val-data", str(short)
    )
    assert "does not exist" in refused(capsys, str(source), "--val-data", str(tmp_path / "no.txt"))
    for flags in (
        ["--max-tokens", "0"],
        ["--skip-experts", "1.5"],
        ["--site", "0", "--skip-experts", "0"],
    ):
        with pytest.raises((SystemExit, AssertionError)) as stopped:
            refused(capsys, *given, *flags)
        assert isinstance(stopped.value, SystemExit) and stopped.value.code == 2
        assert flags[0].strip("-").replace("-", "_") in capsys.readouterr().err


def test_site_and_checkpoint_are_refused_without_a_run(tmp_path, text, capsys):
    model = random_model(tiny_config())
    out = write_plain(tmp_path, model)
    given = [str(out), "--val-data", str(text)]
    assert "does not say which site held which" in refused(capsys, *given, "--site", "0")
    assert "checkpoint must be given for run folders only" in refused(
        capsys, *given, "--checkpoint", "x"
    )
    assert "site must be in [0, 2)" in refused(capsys, str(finished_run()), "--site", "2")


def test_a_run_without_checkpoints_is_named(tmp_path, capsys):
    for name in ("config.toml", "metrics.jsonl"):
        (tmp_path / name).touch()
    assert f"run {tmp_path} has no checkpoint" in refused(capsys, str(tmp_path))


def test_damaged_folders_are_refused(tmp_path, text, capsys):
    model = random_model(tiny_config())
    out = write_plain(tmp_path, model)
    given = [str(out), "--val-data", str(text)]
    (out / "checksums.json").unlink()  # with it see test_damage.py
    config = (out / "config.toml").read_text()
    (out / "config.toml").write_text(config.replace("num_layers = 2", "num_layers = 3"))
    assert "has no tensor blocks.2" in refused(capsys, *given)
    (out / "config.toml").write_text(
        config.replace("intermediate_size = 8", "intermediate_size = 4", 1)
    )
    assert "must have shape" in refused(capsys, *given)
    (out / "config.toml").write_text(config)
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert "cannot read model.safetensors" in refused(capsys, *given)
    run = shutil.copytree(finished_run(), tmp_path / "copy")
    for checkpoint in ckpt.list_checkpoints(run / "checkpoints"):
        (checkpoint / "model-00002-of-00002.safetensors").unlink()
    assert "(written by site 1)" in refused(capsys, str(run))
