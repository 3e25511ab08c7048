"""A transformers model in your own training loop, on two sites that hold half of its experts each.

    python examples/own_loop.py

trains a small random OLMoE on Python's own source code (bytes are tokens) and writes one model of
both sites that plain transformers loads. On two machines start it once on each under torchrun:

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint host0:29500 \\
        examples/own_loop.py
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig

from fomoe_ext import OuterOptions, OuterSync, Placement, hf
from fomoe_ext.launch.processes import run_sites
from fomoe_ext.launch.world import find_world, joined, use_threads

SITES, REPLICATION = 2, 1
ROUNDS, LOCAL_STEPS = 12, 8
BATCH, LENGTH = 8, 128


def make_config() -> OlmoeConfig:
    """A small OLMoE: 4 blocks of 16 experts, of which a token chooses 4."""
    return OlmoeConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )


def source_code() -> Tensor:
    """Bytes of some modules of the standard library, int64 [n]."""
    folder = Path(argparse.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("[a-d]*.py")))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def batch(data: Tensor, site: int, step: int) -> Tensor:
    """Windows of the text, other ones for every site and step: int64 [BATCH, LENGTH]."""
    generator = torch.Generator().manual_seed(1000 * step + site)
    starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator)
    return torch.stack([data[start : start + LENGTH] for start in starts.tolist()])


def main() -> None:
    world = find_world(SITES)
    use_threads(0, world)
    with joined(world, timeout_s=300):
        site = world.site
        config = make_config()
        placement = Placement.cyclic(
            num_sites=SITES,
            num_experts=config.num_experts,
            num_layers=config.num_hidden_layers,
            replication=REPLICATION,
        )
        torch.manual_seed(0)  # all sites start from the same weights
        model = AutoModelForCausalLM.from_config(config)
        hf.convert(model, placement, site, balance="switch")
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
        sync = OuterSync(
            model, placement, site, OuterOptions(codec="int8"), inner_optimizer=optimizer
        )
        data, sent = source_code(), 0
        for round_ in range(ROUNDS):
            total = 0.0
            for step in range(LOCAL_STEPS):
                tokens = batch(data, site, round_ * LOCAL_STEPS + step)
                loss = model(tokens, labels=tokens).loss  # with the loss that balances experts
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() / LOCAL_STEPS
            report = sync.step()  # the sites meet
            sent += report.bytes_sent
            if site == 0:
                megabytes = f"{report.bytes_sent / 1e6:.2f} MB"
                print(f"round {report.round:2d}  loss {total:.3f}  sent {megabytes}", flush=True)
        check(model, placement, site, data)


def check(model: torch.nn.Module, placement: Placement, site: int, data: Tensor) -> None:
    """Writes the model of all sites; site 0 loads it with plain transformers."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save_merged(model, Path(folder) / "model", placement, site)
        if site == 0:
            merged = AutoModelForCausalLM.from_pretrained(Path(folder) / "model")
            tokens = batch(data, site, 10**6)
            with torch.no_grad():
                alone = model(tokens, labels=tokens).loss
                whole = merged(tokens, labels=tokens).loss
            print(f"other text: loss {whole:.3f} with all experts, {alone:.3f} with site 0's half")


if __name__ == "__main__":
    if "RANK" not in os.environ:  # not started by torchrun: both sites on this machine
        sys.exit(run_sites([sys.executable, __file__], SITES))
    main()
