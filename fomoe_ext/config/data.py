"""The section [data]: what text there is to train on and to validate with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataConfig:
    """The text to train on."""

    data: tuple[str, ...] = ()
    """Files, folders and globs of text, .jsonl or .parquet; none = Python's standard library."""
    val_data: tuple[str, ...] = ()
    """Validation text; none = a part of the data, chosen by file."""
    validation_fraction: float = 0.05
    """Share of the files (or documents) kept for validation."""
    text_field: str = "text"
    """Field of a .jsonl line, or column of a parquet file, that holds the text."""
    tokenizer: Path | None = None
    """A tokenizer.json of the `tokenizers` library; none = bytes."""
    cache_dir: Path | None = None
    """Folder for token files; none = the user's cache folder."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction must be in (0, 1), got {self.validation_fraction}"
            )
        if not self.text_field:
            raise ValueError("data.text_field must not be empty")
