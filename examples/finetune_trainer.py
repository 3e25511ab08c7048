"""A transformers model under transformers.Trainer, on two sites that hold half of its experts each.

    python examples/finetune_trainer.py

writes a small random Mixtral. Each site reads only its own experts and trains them on Python's own
source code (tokens are bytes). Both sites then write one model that plain transformers loads. To
use two machines, start it on each with torchrun, as own_loop.py, with --folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from fomoe_ext import OuterOptions, Placement, hf
from fomoe_ext.hf.trainer import OuterSyncCallback, one_process
from fomoe_ext.launch.processes import run_sites
from fomoe_ext.launch.world import find_world, joined, use_threads

SITES, REPLICATION = 2, 1
STEPS, LOCAL_STEPS = 80, 8
BATCH, LENGTH = 8, 128


class SourceCode(Dataset):
    """Windows of some modules of the standard library, different ones for each site."""

    def __init__(self, site: int) -> None:
        folder = Path(argparse.__file__).parent
        text = b"".join(path.read_bytes() for path in sorted(folder.glob("[a-d]*.py")))
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
        self.windows = windows[site::SITES]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def write_start(folder: Path) -> None:
    """Writes the model to start from; usually you would download one."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def train(site: int, folder: Path) -> None:
    placement = Placement.cyclic(
        num_sites=SITES, num_experts=8, num_layers=4, replication=REPLICATION
    )
    # Not balance="bias": Mixtral's files cannot store a selection bias.
    model, info = hf.from_pretrained_resident(
        folder / "start", placement, site, output_loading_info=True, balance="switch"
    )
    if site == 0:
        read, total = info["bytes_read"] / 1e6, info["bytes_total"] / 1e6
        print(f"read {read:.1f} of {total:.1f} MB", flush=True)
    meetings = OuterSyncCallback(
        placement, site, OuterOptions(local_steps=LOCAL_STEPS, codec="int8")
    )
    with one_process():
        arguments = TrainingArguments(
            output_dir=str(folder / f"site-{site}"),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-3,
            logging_steps=LOCAL_STEPS,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=site,
        )
        logging.disable_progress_bar()
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=SourceCode(site),
            callbacks=[meetings],
        )
        if site != 0:
            trainer.remove_callback(PrinterCallback)
        trainer.train()
    hf.save_merged(model, folder / "merged", placement, site)
    if site == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        sent = sum(report.bytes_sent for report in meetings.reports)
        print(f"loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f}, sent {sent / 1e6:.1f} MB")
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
        tokens = SourceCode(site).windows[:BATCH]
        with torch.no_grad():
            print(f"merged model: loss {merged(tokens, labels=tokens).loss:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="folder for the models, shared by all sites")
    folder = parser.parse_args().folder
    world = find_world(SITES)
    use_threads(0, world)
    with joined(world, timeout_s=300):
        train(world.site, folder)


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:  # not started by torchrun: start both sites on this machine
        with tempfile.TemporaryDirectory() as temporary:
            write_start(Path(temporary) / "start")
            sys.exit(run_sites([sys.executable, __file__, "--folder", temporary], SITES))
