"""A transformers model in your own training loop, on two sites that hold half of its experts each.

    python examples/own_loop.py

trains a small random OLMoE on Python's own source code (tokens are bytes). Both sites then write
one model that plain transformers loads. To use two machines, start it on each with torchrun:

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
    """Windows of the text, different ones for each site and step: int64 [BATCH, LENGTH]."""
    generator = torch.Generator().manual_seed(1000 * step + site)
    starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator)
    return torch.stack([data[start : start + LENGTH] for start in starts.tolist()])


def train(site: int) -> None:
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
    options = OuterOptions(codec="int8")
    data, losses = source_code(), []
    with OuterSync(model, placement, site, options, inner_optimizer=optimizer) as sync:
        for step in range(ROUNDS * LOCAL_STEPS):
            tokens = batch(data, site, step)
            loss = model(tokens, labels=tokens).loss  # includes the loss that balances experts
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if (step + 1) % LOCAL_STEPS == 0:  # the sites meet
                report = sync.step()
                if site == 0:
                    mean, sent = sum(losses[-LOCAL_STEPS:]) / LOCAL_STEPS, report.bytes_sent / 1e6
                    print(
                        f"round {report.round:2d}  loss {mean:.3f}  sent {sent:.2f} MB", flush=True
                    )
    check(model, placement, site, data)


def check(model: torch.nn.Module, placement: Placement, site: int, data: Tensor) -> None:
    """All sites write the global model; site 0 loads it with plain transformers."""
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
    if "RANK" not in os.environ:  # not started by torchrun: start both sites on this machine
        sys.exit(run_sites([sys.executable, __file__], SITES))
    world = find_world(SITES)
    use_threads(0, world)
    with joined(world, timeout_s=300):
        train(world.site)
