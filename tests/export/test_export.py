"""`fomoe export`: the folder loads into plain transformers and is the model that was trained."""

from __future__ import annotations

import ast
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
from safetensors import safe_open
from safetensors.torch import load_file
from small_run import finished_run, random_model, relative_error, tiny_config, untrained_run

import fomoe_ext.export.exported
from fomoe_ext import cli
from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.reader import GlobalModelReader, load_global_model
from fomoe_ext.config.io import load_config
from fomoe_ext.config.job import DataConfig, SitesConfig, TrainConfig
from fomoe_ext.export import command as export
from fomoe_ext.files import tensors as tensor_files
from fomoe_ext.model.language import LanguageModel

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def load(folder: Path, **options):
    """The exported model as a user of transformers loads it."""
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, trust_remote_code=True, **options).eval()


def write(source: Path, out: Path, *flags: str) -> Path:
    """`fomoe export`, which must go well."""
    assert cli.main(["export", str(source), "--out", str(out), *flags]) == 0
    return out


def tokens_of(config, *shape: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def global_model(checkpoint: Path) -> LanguageModel:
    """The global model of a checkpoint, on fomoe_ext's kernels."""
    model = LanguageModel(export.find_source(checkpoint).model)
    load_global_model(checkpoint, model)
    return model.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The global model of a finished run, and what transformers loads of its export."""
    out = write(finished_run(), tmp_path_factory.mktemp("trained") / "out")
    newest = ckpt.list_checkpoints(finished_run() / "checkpoints")[-1]
    return global_model(newest), load(out), out


# ---- the same model ------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "softmax and groups": {
        "scoring": "softmax",
        "num_groups": 4,
        "groups_kept": 2,
        "renormalize": True,
        "routed_scale": 2.5,
        "activation": "geglu",
    },
    "gpt-oss": {"activation": "clamped_swiglu", "expert_bias": True, "top_k": 4, "norm": "rms"},
    "shared": {"shared_expert_size": 12, "activation": "silu", "depth_multiplier": 0.5},
    "resident": {"router_scope": "resident", "activation": "relu2", "rope_base": 500.0},
    "gelu": {"activation": "gelu", "expert_bias": True, "num_groups": 2, "vocab_size": 300},
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_logits_and_loss_are_the_same(tmp_path, changes):
    config = tiny_config(**changes)
    model = random_model(config)
    tokenizer = [] if config.vocab_size == 256 else ["--tokenizer", word_tokenizer(tmp_path, 290)]
    source = untrained_run(tmp_path, model)
    exported = load(write(source, tmp_path / "out", *tokenizer))
    tokens = tokens_of(config, 3, 25)
    with torch.no_grad():
        outputs = exported(tokens[:, :-1])
        assert relative_error(outputs.logits, model(tokens[:, :-1])) <= 1e-5
        loss = exported(tokens, labels=tokens).loss
        assert float(loss) == pytest.approx(float(model.loss(tokens).cross_entropy), rel=1e-5)


def test_a_trained_run_gives_the_same_logits_and_loss(trained):
    model, exported, _ = trained
    tokens = torch.tensor([list(b"def __init__(self, value: int) -")])
    with torch.no_grad():
        assert relative_error(exported(tokens).logits, model(tokens)) <= 1e-5


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradients_are_the_same(tmp_path):
    model = random_model(tiny_config(renormalize=True, shared_expert_size=8, expert_bias=True))
    exported = load(write(untrained_run(tmp_path, model), tmp_path / "out"))
    exported.train()
    exported.gradient_checkpointing_enable()
    tokens = tokens_of(model.config, 4, 24)
    model.loss(tokens).cross_entropy.backward()
    exported(tokens, labels=tokens).loss.backward()
    found = {name: p.grad for name, p in exported.named_parameters() if p.grad is not None}
    compared = 0
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            assert relative_error(found[export.exported_name(name)], parameter.grad) <= 1e-5
            compared += 1
    for expert in range(8):
        for part in ("expand_weight", "contract_bias"):
            wanted = model.blocks[1].moe.experts.part(part).grad[expert]
            name = export.exported_name(f"blocks.1.moe.experts.{expert}.{part}")
            if name in found:
                assert relative_error(found[name], wanted) <= 1e-5
                compared += 1
            else:  # got no token
                assert not wanted.any()
    assert compared > 30


def test_bf16_is_as_close_as_our_own(tmp_path):
    # Every expert is chosen: a choice that rounding turns over would hide what is looked for.
    model = random_model(tiny_config(top_k=8, expert_bias=True, shared_expert_size=8))
    out = write(untrained_run(tmp_path, model), tmp_path / "out", "--dtype", "bfloat16")
    exported = load(out)
    assert exported.dtype == torch.bfloat16
    router = exported.model.blocks[0].moe.router
    assert router.selection_bias.dtype == torch.float32
    assert torch.equal(router.selection_bias, model.blocks[0].moe.router.selection_bias)
    fp32 = write(tmp_path / "checkpoints/step-00000008", tmp_path / "fp32")
    again = load(fp32, dtype="bfloat16").state_dict()
    tokens = tokens_of(model.config, 4, 24)
    with torch.no_grad():
        exact = model(tokens)
        own = model.to(torch.bfloat16)(tokens)
        assert relative_error(exported(tokens).logits, exact) <= 1.2 * relative_error(own, exact)
    assert all(torch.equal(again[name], value) for name, value in exported.state_dict().items())


def test_the_exported_code_needs_nothing_of_ours():
    folder = Path(fomoe_ext.export.exported.__file__).parent
    imported = set()
    for name in ("configuration_fomoe.py", "modeling_fomoe.py"):
        for node in ast.walk(ast.parse((folder / name).read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    assert imported == {"__future__", "dataclasses", "torch", "transformers", "typing"}


# ---- generation ----------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: LanguageModel, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """The most likely tokens one by one, each from a whole forward pass."""
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=["cache", "no cache", "static cache"],
)
def test_greedy_tokens_are_those_of_our_model(tmp_path, options):
    model = random_model(tiny_config(renormalize=True))
    exported = load(write(untrained_run(tmp_path, model), tmp_path / "out"))
    prompt = tokens_of(model.config, 3, 6)
    found = exported.generate(
        prompt, max_new_tokens=17, do_sample=False, eos_token_id=None, **options
    )
    assert torch.equal(found, greedy(model, prompt, 17))


def test_padding_on_the_left_changes_nothing(tmp_path):
    model = random_model(tiny_config())
    exported = load(write(untrained_run(tmp_path, model), tmp_path / "out"))
    prompt = tokens_of(model.config, 2, 6)
    mask = torch.ones_like(prompt)
    prompt[0, :3], mask[0, :3] = 0, 0
    found = exported.generate(
        prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert torch.equal(found[0, 3:], greedy(model, prompt[:1, 3:], 12)[0])
    assert torch.equal(found[1], greedy(model, prompt[1:], 12)[0])


@pytest.mark.parametrize("kind", ["none given", "dynamic", "static"])
def test_tokens_after_a_cached_beginning(tmp_path, kind):
    model = random_model(tiny_config())
    exported = load(write(untrained_run(tmp_path, model), tmp_path / "out"))
    tokens = tokens_of(model.config, 2, 20)
    cache = {
        "none given": lambda: None,
        "dynamic": lambda: transformers.DynamicCache(config=exported.config),
        "static": lambda: transformers.StaticCache(config=exported.config, max_cache_len=30),
    }[kind]()
    with torch.no_grad():
        wanted = model(tokens)
        for start, end in ((0, 9), (9, 18), (18, 19), (19, 20)):
            outputs = exported(tokens[:, start:end], past_key_values=cache, use_cache=True)
            cache = outputs.get("cache", outputs.get("past_key_values"))
            assert relative_error(outputs.logits, wanted[:, start:end]) <= 1e-5
        few = exported(tokens, logits_to_keep=2).logits
        assert relative_error(few, wanted[:, -2:]) <= 1e-5


def test_generation_ends_at_the_end_of_a_text(trained):
    _, exported, _ = trained
    assert exported.generation_config.eos_token_id == 0  # NUL ends a text of bytes


def test_saved_again_it_is_still_the_same(trained, tmp_path):
    _, exported, _ = trained
    exported.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again").state_dict()
    assert again.keys() == exported.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in exported.state_dict().items())


# ---- tokens --------------------------------------------------------------------------------------


def word_tokenizer(folder: Path, size: int) -> str:
    """A tokenizer.json of whole words with `size` ids, the first of which ends a text."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"</s>": 0, "[unk]": 1, **{f"w{i}": i for i in range(2, size)}}
    model = tokenizers.models.WordLevel(words, unk_token="[unk]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "words.json"))
    return str(folder / "words.json")


def test_bytes_are_ids(trained):
    out = trained[2]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    text = "naïve\x00 Ā\n\t日本 </s> x"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert json.loads((out / "config.json").read_text())["tokens"] == "bytes"
    assert "UTF-8 bytes" in (out / "README.md").read_text()


def test_bytes_can_be_padded_and_end(trained, tmp_path):
    _, exported, out = trained
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 0, 256)
    texts = ["def", "a longer prompt: "]
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask"}
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    found = exported.generate(**batch, **asked)
    for row, text in zip(found, texts, strict=True):  # as without the padding
        alone = exported.generate(**tokenizer(text, return_tensors="pt"), **asked)[0]
        assert torch.equal(row[-len(alone) :], alone)
    odd = "Ā\0\0é"
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        for options in ({}, {"split_special_tokens": True}):
            assert one(odd, **options)["input_ids"] == list(odd.encode())
        assert one.decode([104, 0, 0], skip_special_tokens=True) == "h"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_trainer_evaluates_predicts_and_trains_it(trained, tmp_path):
    pytest.importorskip("accelerate")
    _, exported, out = trained
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    texts = [{"input_ids": list(b"def " * (2 + i))} for i in range(4)]
    model = load(out)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
        ),
        train_dataset=texts,
        eval_dataset=texts,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    with torch.no_grad():
        losses = [exported(**trainer.data_collator([text])).loss for text in texts]
    lengths = torch.tensor([len(text["input_ids"]) - 1.0 for text in texts])
    wanted = float((torch.stack(losses) * lengths).sum() / lengths.sum())
    assert float(trainer.evaluate()["eval_loss"]) == pytest.approx(wanted, rel=1e-4)
    predicted = trainer.predict(texts).predictions
    assert predicted.shape == (4, 20, 256)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    again = load(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_what_is_asked_for_by_configuration_comes(trained):
    model, tokens = load(trained[2]), torch.tensor([[5, 6, 7]])
    model.config.output_hidden_states = True
    assert len(model(tokens).hidden_states) == model.config.num_hidden_layers + 1
    assert isinstance(model(tokens, return_dict=False), tuple)
    model.config.return_dict = False
    assert isinstance(model(tokens), tuple) and isinstance(model.model(tokens), tuple)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(tokens, output_attentions=True)


def test_the_tokenizer_adds_nothing_that_training_did_not(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    file = word_tokenizer(tmp_path, 290)
    tokenizer = tokenizers.Tokenizer.from_file(file)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[unk] $A", special_tokens=[("[unk]", 1)]
    )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(file)
    source = untrained_run(tmp_path, random_model(tiny_config(vocab_size=300)))
    out = write(source, tmp_path / "out", "--tokenizer", file)
    exported = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert exported("w7 w8 w9")["input_ids"] == [7, 8, 9]
    assert exported.pad_token_id == exported.eos_token_id == 0


def test_the_tokenizer_of_the_run_comes_along(tmp_path):
    file = Path(word_tokenizer(tmp_path, 290))
    model = random_model(tiny_config(vocab_size=300))
    config = TrainConfig(data=DataConfig(tokenizer=file), sites=SitesConfig(sites=1, replication=1))
    source = untrained_run(tmp_path, model, config=config)
    out = write(source, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert tokenizer("w7 w289 what </s>")["input_ids"] == [7, 289, 1, 0]
    assert tokenizer.eos_token_id == load(out).generation_config.eos_token_id == 0

    kept = tmp_path / "elsewhere.json"
    file.rename(kept)
    failing = ["export", str(source), "--out", str(tmp_path / "two")]
    assert cli.main(failing) == 2
    assert not (tmp_path / "two").exists()
    assert cli.main([*failing, "--tokenizer", str(kept), "--format", "safetensors"]) == 0
    assert (tmp_path / "two/tokenizer.json").read_bytes() == kept.read_bytes()


def test_a_tokenizer_that_is_not_the_runs_is_refused(tmp_path, capsys):
    source = untrained_run(tmp_path, random_model(tiny_config()))
    other = word_tokenizer(tmp_path, 290)
    assert (
        cli.main(["export", str(source), "--out", str(tmp_path / "o"), "--tokenizer", other]) == 2
    )
    assert "has 290 ids, the model 256" in capsys.readouterr().err


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
    """What is in memory at any time is what the shard under way holds."""
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


def test_the_card_tells_the_runs_facts(trained):
    card = (trained[2] / "README.md").read_text()
    report = json.loads((finished_run() / "report.json").read_text())
    assert "| rounds | 6 of 4 local steps |" in card
    assert "| sites | 2 |" in card and "every expert on 1 of the sites" in card
    assert f"{report['validation']['loss']:.4f} nats/token" in card


def test_where_it_goes_by_default(tmp_path, capsys):
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
    """What `fomoe export` says when it refuses."""
    assert cli.main(["export", *arguments]) == 2
    return capsys.readouterr().err


def test_files_of_another_machine_are_named_with_their_site(run, tmp_path, capsys):
    for checkpoint in ckpt.list_checkpoints(run / "checkpoints"):
        for name, entry in ckpt.read_manifest(checkpoint).files.items():
            if entry.site == 1:
                (checkpoint / name).unlink()
    said = refused(capsys, str(run), "--out", str(tmp_path / "out"))
    assert "step-00000024 lacks model-00002-of-00002.safetensors (written by site 1)" in said
    assert "copy all of them" in said
    assert not (tmp_path / "out").exists()


def test_states_of_sites_are_not_needed(run, tmp_path):
    for state in run.glob("checkpoints/*/state-*.pt"):
        state.unlink()
    write(run, tmp_path / "out")


def test_an_older_checkpoint_is_taken_when_the_newest_is_not_whole(run, tmp_path, capsys):
    broken = run / "checkpoints/step-00000024/model-00001-of-00002.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    write(run, tmp_path / "out")
    said = capsys.readouterr().out
    assert "an older checkpoint is taken" in said and "wanted" in said
    assert "step-00000012, round 3" in said
    said = refused(
        capsys, str(run), "--checkpoint", "step-00000024", "--out", str(tmp_path / "two")
    )
    assert "model-00001-of-00002.safetensors has" in said


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
    assert "is a file" in refused(capsys, str(run), "--out", str(tmp_path / "file"))


def test_other_bad_arguments(run, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert "missing does not exist" in refused(capsys, str(tmp_path / "missing"), *out)
    assert "is neither" in refused(capsys, str(tmp_path), *out)
    assert "step-7 does not exist" in refused(capsys, str(run), "--checkpoint", "step-7", *out)
    alone = run / "checkpoints/step-00000012"
    assert "is a checkpoint itself" in refused(capsys, str(alone), "--checkpoint", "x", *out)
    moved = shutil.copytree(alone, tmp_path / "alone")
    assert "out must be given" in refused(capsys, str(moved))
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint" in refused(capsys, str(run), *out)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(run), "--format", "gguf"])
    assert stopped.value.code == 2


def test_a_lone_checkpoint_of_an_unknown_tokenizer(tmp_path, capsys):
    path = untrained_run(tmp_path, random_model(tiny_config(vocab_size=300)))
    assert "give --tokenizer" in refused(capsys, str(path), "--out", str(tmp_path / "out"))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    path = untrained_run(tmp_path, random_model(tiny_config()))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]  # else it would be damaged
    for field, value, message in (
        ("num_layers", 3, "is not of the model that it names"),
        ("expert_size", 12, "has shape"),
        ("colour", 1, "does not say what its model is"),
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


def test_every_field_of_the_model_has_a_place():
    """A new field of ModelConfig must be exported, or said to matter in training only."""
    config = tiny_config(top_k=3, num_groups=2, groups_kept=2, norm="rms", rope_base=77.0)
    written = export.transformers_config(config, "bytes", 0, "float32")
    assert export.model_of_config(written) == dataclasses.replace(config, balance="none")
    from fomoe_ext.export.exported.configuration_fomoe import FomoeConfig

    fields = inspect.signature(FomoeConfig).parameters
    common = {"architectures", "auto_map", "dtype", "eos_token_id", "model_type", "pad_token_id"}
    assert written.keys() - common <= fields.keys()
