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
from new_process import environment
from torch.utils.data import Dataset

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf_models import EXPERTS, make_model, relative_error, text
from sites import pool

from fomoe_ext import OuterOptions, OuterSync, Placement, hf

EXAMPLES = Path(__file__).parents[2] / "examples"
PLACEMENT = Placement.cyclic(num_sites=2, num_experts=EXPERTS, num_layers=3, replication=1)
STEPS, LOCAL_STEPS = 6, 2


class Texts(Dataset):
    """A data set in which step i of a site reads text i of that site."""

    def __init__(self, site: int) -> None:
        self.texts = [text(1, seed=100 * site + i)[0] for i in range(STEPS)]

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.texts[index], "labels": self.texts[index]}


def make_arguments(folder: str, **more: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        **{
            "output_dir": folder,
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
            "save_steps": 4,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **more,
        }
    )


def trained(
    site: int,
    folder: str,
    options: dict[str, Any],
    steps: int,
    resume: str | None = None,
    **more: Any,
) -> tuple[Any, Any]:
    """A model that a Trainer has trained on a site for some of `STEPS` steps, and its callback.

    `more`: further TrainingArguments.
    """
    from transformers import Trainer, TrainerCallback

    from fomoe_ext.hf.trainer import OuterSyncCallback, one_process

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= steps

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = hf.convert(make_model("olmoe"), PLACEMENT, site, balance="bias").train()
    meetings = OuterSyncCallback(
        PLACEMENT, site, OuterOptions(local_steps=LOCAL_STEPS, **options), resume_from=resume
    )
    os.environ.update(RANK=str(site), WORLD_SIZE="2", LOCAL_RANK=str(site))
    with one_process():
        assert "WORLD_SIZE" not in os.environ
        arguments = make_arguments(f"{folder}/site-{site}", **more)
        trainer = InOrder(
            model=model, args=arguments, train_dataset=Texts(site), callbacks=[meetings, Stop()]
        )
        trainer.train(resume_from_checkpoint=resume)
    assert os.environ.pop("WORLD_SIZE") == "2"
    return model, meetings


def by_hand(site: int, options: dict[str, Any]) -> Any:
    """The same in a plain loop, with the Trainer's defaults."""
    model = hf.convert(make_model("olmoe"), PLACEMENT, site, balance="bias").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    sync = OuterSync(model, PLACEMENT, site, OuterOptions(**options), inner_optimizer=optimizer)
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
    # A Trainer divides the sum of losses by their number: the only difference.
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

    with pytest.raises(ValueError, match="local_steps must be at least 1, got None"):
        OuterSyncCallback(PLACEMENT, 0, OuterOptions())
    with pytest.raises(ValueError, match="site_mean must be 'equal' here, got 'tokens'"):
        OuterSyncCallback(PLACEMENT, 0, OuterOptions(local_steps=2, site_mean="tokens"))
    with pytest.raises(
        ValueError, match=r"folder with outer_sync.safetensors, got .*outer_sync.safetensors"
    ):
        OuterSyncCallback(PLACEMENT, 0, OuterOptions(local_steps=2), resume_from=tmp_path)


# ---- what would let the sites diverge ------------------------------------------------------------


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 4,
    "metric_for_best_model": "loss",
    "load_best_model_at_end": True,
}


def begin(
    folder: Path,
    step: int = 0,
    steps: int = STEPS,
    stored: int = 0,
    stateful: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
    **more: Any,
) -> str:
    """The error when training begins with these arguments, at a single site."""
    from transformers import TrainerControl, TrainerState

    from fomoe_ext.hf.trainer import OuterSyncCallback

    placement = Placement.cyclic(num_sites=1, num_experts=EXPERTS, num_layers=3, replication=1)
    meetings = OuterSyncCallback(
        placement, 0, OuterOptions(local_steps=LOCAL_STEPS, **options or {})
    )
    if stored:
        meetings._state = {"steps": stored}
    state = TrainerState(global_step=step, max_steps=steps)
    state.stateful_callbacks = dict.fromkeys(stateful)
    arguments = make_arguments(str(folder), **more)
    with pytest.raises(ValueError) as caught:
        meetings.on_train_begin(arguments, state, TrainerControl(), model=None, optimizer=None)
    assert meetings.sync is None
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (BEST, "load_best_model_at_end must be False: each site would load"),
        ({"stateful": ("EarlyStoppingCallback",)}, "EarlyStoppingCallback must not be used"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be False"),
        ({"steps": 5, "options": {"fragments": 2}}, "max_steps must be a multiple of local_steps"),
        ({"step": 4}, "got one of step 0; the Trainer begins at step 4"),
        ({"stored": 4}, "got one of step 4; the Trainer begins at step 0"),
        ({"step": 4, "stored": 2}, "got one of step 2; the Trainer begins at step 4"),
        ({"step": 3, "stored": 3}, "of a step at which sites met, a multiple of local_steps = 2"),
    ],
)
def test_arguments_that_let_sites_diverge_are_refused(given, words, tmp_path):
    assert words in begin(tmp_path, **given)


def test_a_trainer_of_several_processes_is_refused(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda _: 2))
    assert "must be created inside one_process(), got arguments for 2 processes" in begin(tmp_path)


def parted(site: int, num_sites: int, folder: str, how: str) -> str:
    from fomoe_ext.outer import MeetingError

    more: dict[str, Any] = {}
    steps = STEPS
    if how == "stops in a round":
        steps = 3 if site else STEPS
    elif how == "stops after one":
        steps = 4 if site else STEPS
    elif how == "fewer steps":
        more = {"max_steps": STEPS - site}
    with pytest.raises((MeetingError, ValueError)) as caught:
        trained(site, folder, {"timeout_s": 10}, steps, **more)
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("stops in a round", "site 0 meets after step 4, site 1 has ended training after step 3"),
        ("stops after one", "site 0 meets after step 6, site 1 has ended training after step 4"),
        ("fewer steps", "all sites must have the same max_steps: site"),
    ],
)
def test_sites_that_take_other_steps_are_named(how, words, tmp_path):
    for told in pool().run(2, parted, str(tmp_path), how):
        assert words in told


def otherwise(site: int, num_sites: int, folder: str, options: dict[str, Any]) -> tuple[int, int]:
    _, meetings = trained(site, folder, options, STEPS)
    meetings.sync.verify()
    return meetings.sync.step_count.reductions, meetings.sync.steps


@pytest.mark.parametrize(
    ("options", "reductions"), [({"optimizer": "ddp"}, STEPS), ({"fragments": 2}, 0)]
)
def test_a_trainer_makes_the_calls_of_its_options(options, reductions, tmp_path):
    assert pool().run(2, otherwise, str(tmp_path), options) == [(reductions, STEPS)] * 2


def left_over(site: int, num_sites: int, folder: str) -> str:
    from fomoe_ext.outer import MeetingError

    with pytest.raises(MeetingError) as caught:
        trained(site, folder, {"fragments": 2}, 5)
    return str(caught.value)


def test_steps_that_have_not_met_are_not_dropped(tmp_path):
    for told in pool().run(2, left_over, str(tmp_path)):
        assert "training ended after step 5, which is not a multiple of local_steps = 2" in told


@pytest.mark.parametrize(
    "name", ["own_loop", pytest.param("finetune_trainer", marks=pytest.mark.slow)]
)
def test_examples_train_to_a_falling_loss(name):
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        env=environment(),
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
