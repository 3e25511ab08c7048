"""The section [data]: the text for training and validation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataConfig:
    """The text for training and validation."""

    data: tuple[str, ...] = ()
    """Training text: files, folders or glob patterns of plain text, .jsonl or .parquet; none = the
    source of Python's standard library."""
    val_data: tuple[str, ...] = ()
    """Validation text, given like data; none = part of data (validation_fraction)."""
    validation_fraction: float = 0.05
    """Share of the files (or documents) of data that is set aside for validation."""
    text_field: str = "text"
    """Field of a .jsonl line, or column of a parquet file, that contains the text."""
    tokenizer: Path | None = None
    """A tokenizer.json of the tokenizers library; none = every byte is a token."""
    cache_dir: Path | None = None
    """Folder for tokenized data; none = the user's cache folder."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction must be in (0, 1), got {self.validation_fraction}"
            )
        if not self.text_field:
            raise ValueError("data.text_field must not be empty")
