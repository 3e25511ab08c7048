"""The source of an export: a checkpoint with a complete global model, and its run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.publish import reading
from fomoe_ext.config.io import check_renamed
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.model import ModelConfig
from fomoe_ext.report.runs import CHECKPOINTS, CONFIG, load_run_config, run_of


@dataclass(frozen=True)
class Source:
    """A checkpoint, with its run folder and configuration (None for one outside of a run)."""

    checkpoint: Path
    manifest: ckpt.Manifest
    model: ModelConfig
    config: TrainConfig | None
    run: Path | None
    passed_over: str = ""
    """Why newer checkpoints were not used; "" if there are none."""
    lock: Any = field(default=None, repr=False, compare=False)
    """While this exists, a running job does not delete the checkpoint."""

    def tokenizer(self, given: Path | None) -> Path | None:
        """The tokenizer's file: `given`, or else that of the run; None = tokens are bytes.

        Raises ValueError if the run's tokenizer is unknown, or is not the one used in training.
        """
        if given is not None:
            return given
        if self.config is not None:
            self._check_tokenizer(self.config.data.tokenizer)
            return self.config.data.tokenizer
        if self.model.vocab_size > 256:
            raise ValueError(
                f"--tokenizer must be given for {self.checkpoint}, which is not in a run folder: "
                "its tokenizer is unknown"
            )
        return None

    def _check_tokenizer(self, file: Path | None) -> None:
        wanted = self.manifest.meta.get("tokenizer")  # not in checkpoints of earlier versions
        if wanted is None or (file is not None and not file.is_file()):
            return
        found = "byte" if file is None else ckpt.sha256(file)
        if found != wanted:
            raise ValueError(
                f"tokenizer must be the one that the run was trained with, got {file or 'bytes'}, "
                "which was changed or is damaged (to use another one anyway, give --tokenizer)"
            )


def model_files(manifest: ckpt.Manifest) -> list[str]:
    """Names of the checkpoint's files with the global model."""
    return [name for name in manifest.files if name.endswith(".safetensors") and "/" not in name]


def why_not_whole(path: Path) -> str:
    """Why a checkpoint's global model cannot be read here, or ""; states of sites do not matter."""
    try:
        manifest = ckpt.read_manifest(path)
    except ckpt.CheckpointError as error:
        return str(error)
    missing, damaged = [], []
    for name in model_files(manifest):
        entry, file = manifest.files[name], path / name
        if not file.is_file():
            missing.append(f"{name} (written by site {entry.site})")
        elif file.stat().st_size != entry.size:
            damaged.append(f"{name} must have {entry.size} bytes, got {file.stat().st_size}")
    if missing:
        return (
            f"checkpoint {path} lacks {', '.join(missing)}: without a shared file system each "
            "machine has only the files of its own sites; copy all files into this folder"
        )
    return f"checkpoint {path}: {'; '.join(damaged)}" if damaged else ""


def _newest(folder: Path) -> tuple[Path, str]:
    """The newest checkpoint with a complete global model, and why newer ones were not used."""
    found = ckpt.list_checkpoints(folder)
    reasons: list[str] = []
    for path in reversed(found):
        reason = why_not_whole(path)
        if not reason:
            return path, "; ".join(reasons)
        reasons.append(reason)
    if not found:
        raise FileNotFoundError(f"run {folder.parent} has no checkpoint in {folder}")
    raise ValueError(reasons[0])


def find_source(path: Path, name: str | None = None) -> Source:
    """The checkpoint in a run folder, or the one at a checkpoint's own path.

    name: of a checkpoint in the run folder; None = the newest with a complete global model. Raises
    FileNotFoundError or ValueError if there is none.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"run {path} does not exist")
    path, passed_over = path.resolve(), ""
    if (path / ckpt.MANIFEST).is_file():
        if name is not None:
            raise ValueError(
                f"checkpoint must not be given for a checkpoint's own folder {path}, got {name}"
            )
        chosen = path
    elif (path / CHECKPOINTS).is_dir() or (path / CONFIG).is_file():
        if name is None:
            chosen, passed_over = _newest(path / CHECKPOINTS)
        else:
            chosen = path / CHECKPOINTS / name
    else:
        raise ValueError(
            f"run must be a run folder of `fomoe train` (with {CONFIG} and {CHECKPOINTS}/) or a "
            f"checkpoint (with {ckpt.MANIFEST}), got {path}"
        )
    if reason := why_not_whole(chosen):
        raise ValueError(reason)
    manifest = ckpt.read_manifest(chosen)
    try:
        options = dict(manifest.meta["model"])
        check_renamed(options, "model", f"model in {ckpt.MANIFEST}")
        model = ModelConfig(**options)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"checkpoint {chosen} must have a valid description of its model: {error}"
        ) from None
    run = run_of(chosen) if (run_of(chosen) / CONFIG).is_file() else None
    config = None if run is None else load_run_config(run)
    return Source(chosen, manifest, model, config, run, passed_over, reading(chosen))
