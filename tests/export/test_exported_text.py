"""What an exported model generates, and the tokenizer beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exported_model import load, tokens_of, transformers, word_tokenizer, write
from small_run import random_model, relative_error, tiny_config, untrained_run

from fomoe_ext import cli
from fomoe_ext.config.data import DataConfig
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.sites import SitesConfig
from fomoe_ext.model.language import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")


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
    model = random_model(tiny_config(router_renormalize=True))
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
    assert "must have at most the model's 256 ids, got 290" in capsys.readouterr().err
