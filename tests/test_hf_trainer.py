"""Sites that train under transformers.Trainer, and the examples."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf_models import EXPERTS, make_model, relative_error, text
from sites import pool

import fomoe_ext
from fomoe_ext import OuterSync, Placement, hf

HOME = Path(fomoe_ext.__file__).parents[1]
EXAMPLES = Path(__file__).parents[1] / "examples"
PLACEMENT = Placement.cyclic(2, EXPERTS, 3, 1)
STEPS, LOCAL_STEPS = 6, 2


class Texts(Dataset):
    """Step i of a site sees text i of the site."""

    def __init__(self, site: int) -> None:
        self.texts = [text(1, seed=100 * site + i)[0] for i in range(STEPS)]

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.texts[index], "labels": self.texts[index]}


def trained(
    site: int, folder: str, options: dict[str, Any], steps: int, resume: str | None = None
) -> tuple[Any, Any]:
    """A model that a Trainer has trained on a site for some of `STEPS` steps, and its callback."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from fomoe_ext.hf.trainer import OuterSyncCallback, one_process

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= steps

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = hf.convert(make_model("olmoe"), placement=PLACEMENT, site=site, balance="bias").train()
    meetings = OuterSyncCallback(
        PLACEMENT, site, local_steps=LOCAL_STEPS, resume_from=resume, **options
    )
    os.environ.update(RANK=str(site), WORLD_SIZE="2", LOCAL_RANK=str(site))
    with one_process():
        assert "WORLD_SIZE" not in os.environ
        arguments = TrainingArguments(
            output_dir=f"{folder}/site-{site}",
            max_steps=STEPS,
            per_device_train_batch_size=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            save_steps=4,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = InOrder(
            model=model, args=arguments, train_dataset=Texts(site), callbacks=[meetings, Stop()]
        )
        trainer.train(resume_from_checkpoint=resume)
    assert os.environ.pop("WORLD_SIZE") == "2"
    return model, meetings


def by_hand(site: int, options: dict[str, Any]) -> Any:
    """The same in a loop of one's own, with what the Trainer does by default."""
    model = hf.convert(make_model("olmoe"), placement=PLACEMENT, site=site, balance="bias").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    sync = OuterSync(model, PLACEMENT, site, inner_optimizer=optimizer, **options)
    for step, sample in enumerate(Texts(site)):
        if step == STEPS:
            break
        tokens = sample["input_ids"][None]
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for layer in hf.layers(model):
            layer.update_selection_bias()
        if (step + 1) % LOCAL_STEPS == 0:
            sync.step()
    return model


def train_both(site: int, num_sites: int, folder: str) -> tuple[int, int]:
    options = {"codec": "int8"}
    model, meetings = trained(site, folder, options, STEPS)
    expected = by_hand(site, options)
    # A Trainer divides the sum of losses by their number; else the same.
    for (name, value), other in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert relative_error(value, other) < 2e-4, name
    meetings.sync.verify()
    return len(meetings.reports), meetings.sync.bytes_sent


def test_a_trainer_does_what_a_loop_does(tmp_path):
    for rounds, sent in pool().run(2, train_both, str(tmp_path)):
        assert rounds == STEPS // LOCAL_STEPS and sent > 10_000


def resume_one(site: int, num_sites: int, folder: str) -> None:
    options = {"codec": "int8", "optimizer": "diloco"}
    whole, _ = trained(site, f"{folder}/whole", options, STEPS)
    trained(site, f"{folder}/cut", options, 5)
    checkpoint = f"{folder}/cut/site-{site}/checkpoint-4"
    model, meetings = trained(site, f"{folder}/cut", options, STEPS, checkpoint)
    assert meetings.sync.round == 3
    for (name, value), other in zip(
        model.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_a_trainer_resumes_bit_for_bit(tmp_path):
    pool().run(2, resume_one, str(tmp_path))


def uneven(site: int, num_sites: int, folder: str) -> int:
    _, meetings = trained(site, folder, {}, 5)
    meetings.sync.verify()
    return len(meetings.reports)


def test_the_last_steps_end_with_a_meeting(tmp_path):
    assert pool().run(2, uneven, str(tmp_path)) == [3, 3]


def test_bad_arguments_are_named(tmp_path):
    from fomoe_ext.hf.trainer import OuterSyncCallback

    with pytest.raises(ValueError, match="local_steps must be at least 1, got 0"):
        OuterSyncCallback(PLACEMENT, 0, local_steps=0)
    with pytest.raises(
        ValueError, match=r"folder with outer_sync.safetensors, got .*outer_sync.safetensors"
    ):
        OuterSyncCallback(PLACEMENT, 0, local_steps=2, resume_from=tmp_path)


@pytest.mark.parametrize(
    "name", ["own_loop", pytest.param("finetune_trainer", marks=pytest.mark.slow)]
)
def test_examples_train_to_a_falling_loss(name):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HOME), *filter(None, sys.path)])}
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    of_rounds = r"^(?:round +\d+  loss |\{'loss': ')(\d+\.\d+)"
    losses = [float(x) for x in re.findall(of_rounds, result.stdout, re.MULTILINE)]
    assert len(losses) >= 10 and losses[0] > 4, result.stdout
    assert all(loss < 3.3 for loss in losses[-3:]), result.stdout
    (merged,) = re.findall(r"^(?:other text|merged model): loss (\d+\.\d+)", result.stdout, re.M)
    assert float(merged) < 3.3
