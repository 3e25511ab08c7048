"""The tokenizer files of an exported model: for bytes, or from the tokenizer of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fomoe_ext.config.model import ModelConfig
from fomoe_ext.data.text import Tokenizer, load_tokenizer
from fomoe_ext.export.format import write_json

TOKENIZER = "tokenizer.json"
_NUL = "\0"


def _byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json whose ids are UTF-8 bytes.

    The ByteLevel step of the `tokenizers` library maps each byte to a printable character:
    printable bytes to themselves, others to U+0100 and following. Without merges these are the
    tokens.
    NUL is the end-of-text, padding and unknown token; only NUL itself can be unknown, when special
    tokens in a text are encoded as ordinary text.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable}
    character |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    character[0] = _NUL
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 0,
                "content": _NUL,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": False},
        "post_processor": None,
        "decoder": {**level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _NUL,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {character[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }


def read_tokenizer(file: Path | None) -> Tokenizer:
    """The tokenizer in a file; None = bytes. Errors name the flag for another file."""
    try:
        return load_tokenizer(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: give --tokenizer") from None
    except RuntimeError as error:  # the library is not installed
        raise ValueError(str(error)) from None


def _text_only(file: Path) -> dict[str, Any]:
    """The content of a tokenizer.json that encodes a text as in training.

    Steps that add special tokens, truncate or pad are removed: training did not use them.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    content |= {"truncation": None, "padding": None}
    steps = content.get("post_processor") or {}
    kept = [s for s in steps.get("processors", [steps]) if s.get("type") == "ByteLevel"]
    content["post_processor"] = kept[0] if kept else None
    return content


def write_tokenizer(folder: Path, file: Path | None, model: ModelConfig) -> int | None:
    """Writes tokenizer.json and tokenizer_config.json; returns the end-of-text id, if any."""
    coder = read_tokenizer(file)
    if coder.vocab_size > model.vocab_size:
        raise ValueError(
            f"tokenizer {file} must have at most the model's {model.vocab_size} ids, got "
            f"{coder.vocab_size}: it is not the one of the run"
        )
    end = int(coder.separator[0]) if len(coder.separator) else None
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if file is None:
        content, name = _byte_tokenizer(), _NUL
    else:
        content, name = _text_only(file), None
        if end is not None:
            import tokenizers

            name = tokenizers.Tokenizer.from_file(str(file)).id_to_token(end)
    if name is not None:
        config |= {"eos_token": name, "pad_token": name}
    write_json(folder / TOKENIZER, content)
    write_json(folder / "tokenizer_config.json", config)
    return end
