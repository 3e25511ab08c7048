"""The README.md (model card) of an exported model: facts about it, its training, how to use it."""

from __future__ import annotations

from typing import Any

from fomoe_ext.checkpoint.manifest import Manifest
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.model import ModelConfig, count_parameters
from fomoe_ext.report.units import human_count

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, fomoe]
---

# A FoMoE language model

A decoder-only language model with a Mixture of Experts in every block. It was trained by \
`fomoe train` on several sites that each hold only some of the experts (see the table), and \
exported by `fomoe export` as one model with all experts.

| | |
|---|---|
{facts}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/of/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer("Hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

`trust_remote_code=True` is required: transformers does not include this architecture, so it \
runs `modeling_fomoe.py` and `configuration_fomoe.py` from this folder. Read them first if you do \
not trust where the folder comes from. With `labels` the model returns the cross entropy, without \
losses that balance experts.{padding}

{about_tokens}
"""

_BYTES = """## Tokens are bytes

The ids are the UTF-8 bytes of a text, 0..255; id 0 (NUL) ends a text. To encode and decode \
without a tokenizer:

```python
ids = torch.tensor([list("Hello".encode())])
text = bytes(ids[0].tolist()).decode(errors="replace")
```

`tokenizer.json` does the same for tools that need a tokenizer file."""


def _facts(
    model: ModelConfig,
    config: TrainConfig | None,
    manifest: Manifest,
    validation: dict[str, Any] | None,
    dtype: str,
) -> list[tuple[str, str]]:
    counts = count_parameters(model)
    meta = manifest.meta
    rows = [
        ("parameters", f"{human_count(counts.total)}, {counts.sparse_share:.0%} in experts"),
        ("layers x width", f"{model.num_layers} x {model.hidden_size}"),
        (
            "experts per layer",
            f"{model.num_experts} of size {model.intermediate_size}, {model.top_k} per token",
        ),
        ("longest training sequence", f"{model.seq_len} tokens"),
        ("tensors", dtype),
        ("sites", str(manifest.num_sites)),
    ]
    if "replication" in meta:
        rows.append(("replication", f"each expert on {meta['replication']} of the sites"))
    local = f" of {meta['local_steps']} local steps" if "local_steps" in meta else ""
    rows.append(("rounds", f"{manifest.round}{local}"))
    if config is not None:
        tokens = (
            manifest.round
            * config.run.local_steps
            * config.sites.sites
            * config.inner.batch_size
            * model.seq_len
        )
        outer = config.outer
        rows.append(("training tokens, all sites", human_count(tokens)))
        rows.append(("outer optimizer", f"{outer.optimizer}, updates sent as {outer.codec}"))
        rows.append(("router scope in training", model.router_scope))
        rows.append(("seed", str(config.run.seed)))
    measured = "not measured at this round"
    if validation is not None:
        measured = (
            f"{validation['loss']:.4f} nats/token, {validation['bits_per_byte']:.3f} bits/byte "
            f"({human_count(validation['tokens'])} tokens, all experts)"
        )
    return [*rows, ("validation loss", measured)]


def model_card(
    model: ModelConfig,
    config: TrainConfig | None,
    manifest: Manifest,
    validation: dict[str, Any] | None,
    *,
    tokens: str,
    end: int | None,
    dtype: str,
) -> str:
    """The text of README.md. validation: a record of metrics.jsonl; None = not measured at this
    round. tokens, end: as for `transformers_config`."""
    facts = _facts(model, config, manifest, validation, dtype)
    ends = "it has no end-of-text id" if end is None else f"id {end} ends a text"
    padding = ""
    if end is not None:
        padding = (
            " To generate from several prompts in one batch, pad them on the left: "
            '`tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")`.'
        )
    about_tokens = _BYTES
    if tokens != "bytes":
        about_tokens = (
            f"## Tokens\n\nThe model was trained with the tokenizer in `{tokens}`; {ends}."
        )
    return _CARD.format(
        facts="\n".join(f"| {key} | {value} |" for key, value in facts),
        padding=padding,
        about_tokens=about_tokens,
    )
