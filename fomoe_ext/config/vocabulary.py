"""Warns about a vocabulary much larger than the data's tokens can use. Needs no torch."""

from __future__ import annotations

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.model import count_parameters

BYTES = 256
"""Number of token ids without a tokenizer, where tokens are bytes."""
_LEAST_SHARE = 0.01


def vocabulary_notes(config: TrainConfig, num_ids: int | None = None) -> list[str]:
    """A note if at least 1 % of the model's parameters are embedding rows that no token uses.

    num_ids: number of token ids of the data's tokenizer. None = 256 for a job without a tokenizer;
    with one the number is unknown, and there is no note.
    """
    if num_ids is None:
        if config.data.tokenizer is not None:
            return []
        num_ids = BYTES
    model = config.model
    unused = (model.vocab_size - num_ids) * model.hidden_size
    share = unused / count_parameters(model).total
    if share < _LEAST_SHARE:
        return []
    kind = "bytes" if config.data.tokenizer is None else config.data.tokenizer.name
    size = f"{share:.0%} of all parameters ({unused / 1e6:.1f} million)"
    return [
        f"the data's tokens ({kind}) use {num_ids} of the {model.vocab_size} ids of the "
        f"vocabulary: {size} belong to ids that never occur. "
        f"--vocab-size {num_ids} leaves them out, --tokenizer chooses other tokens"
    ]
