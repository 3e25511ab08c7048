"""What `fomoe export` exports: a checkpoint whose global model is whole, and the run around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.publish import reading
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.model import ModelConfig
from fomoe_ext.report.runs import CHECKPOINTS, CONFIG, load_run_config, run_of


@dataclass(frozen=True)
class Source:
    """A checkpoint, the run folder around it and its configuration (None for a lone checkpoint)."""

    checkpoint: Path
    manifest: ckpt.Manifest
    model: ModelConfig
    config: TrainConfig | None
    run: Path | None
    passed_over: str = ""
    """Why newer checkpoints were not taken; "" = there are none."""
    lock: Any = field(default=None, repr=False, compare=False)
    """While it is kept, a job that is running leaves the checkpoint where it is."""

    def tokenizer(self, given: Path | None) -> Path | None:
        """The tokenizer's file, `given` or the run's; None = bytes.

        Raises ValueError when it is not known, or is not what the run was trained with.
        """
        if given is not None:
            return given
        if self.config is not None:
            self._check_tokenizer(self.config.data.tokenizer)
            return self.config.data.tokenizer
        if self.model.vocab_size > 256:
            raise ValueError(
                f"{self.checkpoint} is not in a run folder, so its tokenizer is not known: "
                "give --tokenizer"
            )
        return None

    def _check_tokenizer(self, file: Path | None) -> None:
        wanted = self.manifest.meta.get("tokenizer")  # not in checkpoints of earlier versions
        if wanted is None or (file is not None and not file.is_file()):
            return
        found = "byte" if file is None else ckpt.sha256(file)
        if found != wanted:
            raise ValueError(
                f"tokenizer {file or 'bytes'} is not what the run was trained with: it has been "
                "changed, or is damaged (--tokenizer takes another all the same)"
            )


def model_files(manifest: ckpt.Manifest) -> list[str]:
    """Names of the checkpoint files that hold the global model."""
    return [name for name in manifest.files if name.endswith(".safetensors") and "/" not in name]


def why_not_whole(path: Path) -> str:
    """Why a checkpoint's global model cannot be read here, or "". States of sites don't matter."""
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
            damaged.append(f"{name} has {file.stat().st_size} bytes, wanted {entry.size}")
    if missing:
        return (
            f"checkpoint {path} lacks {', '.join(missing)}: where sites share no file system each "
            "machine has the files of its own sites; copy all of them into this folder"
        )
    return f"checkpoint {path}: {'; '.join(damaged)}" if damaged else ""


def _newest(folder: Path) -> tuple[Path, str]:
    """The newest checkpoint whose global model is whole, and why newer ones were passed over."""
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
    """The checkpoint that a run folder or a checkpoint's own folder stands for.

    `name` is of one in the run folder; None = the newest whose global model is whole. Raises
    FileNotFoundError or ValueError when there is none.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"run {path} does not exist")
    path, passed_over = path.resolve(), ""
    if (path / ckpt.MANIFEST).is_file():
        if name is not None:
            raise ValueError(f"checkpoint {name} was named, but {path} is a checkpoint itself")
        chosen = path
    elif (path / CHECKPOINTS).is_dir() or (path / CONFIG).is_file():
        if name is None:
            chosen, passed_over = _newest(path / CHECKPOINTS)
        else:
            chosen = path / CHECKPOINTS / name
    else:
        raise ValueError(
            f"run must be a run folder of `fomoe train` (it has {CONFIG} and {CHECKPOINTS}/) or a "
            f"checkpoint (it has {ckpt.MANIFEST}), {path} is neither"
        )
    if reason := why_not_whole(chosen):
        raise ValueError(reason)
    manifest = ckpt.read_manifest(chosen)
    try:
        model = ModelConfig(**manifest.meta["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {chosen} does not say what its model is ({error})") from None
    run = run_of(chosen) if (run_of(chosen) / CONFIG).is_file() else None
    config = None if run is None else load_run_config(run)
    return Source(chosen, manifest, model, config, run, passed_over, reading(chosen))
