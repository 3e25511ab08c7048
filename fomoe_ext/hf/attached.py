"""What a conversion adds to a transformers model: the balance losses, and its own saving."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fomoe_ext.files.atomic import write_text
from fomoe_ext.layer.losses import wants_loss
from fomoe_ext.layer.moe import MoELayer

_MARK = "fomoe_converted_"
"""Prefix of model_type in a marked config.json, so that transformers refuses it by name."""


# ---- the balance loss ----------------------------------------------------------------------------


def _share(given: dict[str, Any]) -> Any:
    """This pass's share of a step's loss. A Trainer adds the losses of a step's passes, each
    already divided by the step's number of tokens; elsewhere the share is 1."""
    items, labels = given.get("num_items_in_batch"), given.get("labels")
    if items is None or not isinstance(labels, torch.Tensor):
        return 1.0
    own = (labels[..., 1:] != -100).sum()
    return own / (items.to(own.device) if isinstance(items, torch.Tensor) else items)


def add_balance_loss(model: nn.Module, inputs: Any, given: dict[str, Any], output: Any) -> Any:
    """A forward hook: in training, adds the layers' balance losses to `output.loss`.

    It detaches every `aux_loss` that it adds, so that a loop that adds `aux_loss` too does not get
    its gradient twice. Raises RuntimeError if the losses have no graph although routers train.
    """
    if not model.training:
        return None
    as_tuple = isinstance(output, tuple)
    loss = (output[0] if output else None) if as_tuple else getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.dim() or not loss.is_floating_point():
        return None  # there were no labels
    found = (m for m in model.modules() if isinstance(m, MoELayer))
    layers = [m for m in found if wants_loss(m.balance, m.router_z_loss_coef)]
    if not layers:
        return None
    trained = any(p.requires_grad for layer in layers for p in layer.router.parameters())
    if loss.requires_grad and trained and not all(m.aux_loss.requires_grad for m in layers):
        raise RuntimeError(
            "the balance loss has no gradient, because reentrant checkpointing discards it: use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    share = _share(given)
    for layer in layers:
        loss = loss + (layer.aux_loss * share).to(loss.device)
        layer.aux_loss = layer.aux_loss.detach()
    if as_tuple:
        return (loss, *output[1:])
    output.loss = loss
    return output


# ---- saving --------------------------------------------------------------------------------------


class SaveConverted:
    """`save_pretrained` of a converted model; replaces that of transformers.

    It writes the original format if that format can store the model. Otherwise the tensors keep the
    names of the converted model: for a site with only some experts, for a feature that the format
    lacks, and for a checkpoint of a Trainer, which loads it into the converted model again. The
    configuration of such a folder is marked, so that transformers refuses it instead of
    initialising random experts.
    """

    def __init__(
        self, model: Any, why_not: Callable[[Any], str], save: Callable[..., None]
    ) -> None:
        """why_not: returns why a model cannot be in the original format, or "". save: writes a
        model in the original format."""
        self.model, self.why_not, self.save = model, why_not, save

    def __call__(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As `PreTrainedModel.save_pretrained`."""
        folder = Path(save_directory)
        name, _, number = folder.name.partition("-")
        of_trainer = name == "checkpoint" and number.isdigit()
        given = options.get("state_dict") is not None
        reason = self.why_not(self.model)
        elsewhere = dist.is_initialized() and dist.get_rank() != 0
        if getattr(self.model, "_hf_peft_config_loaded", False):  # writes adapters alone
            type(self.model).save_pretrained(self.model, save_directory, *args, **options)
            return
        if not (reason or of_trainer or given or args or elsewhere):
            try:
                self.save(self.model, folder, **options)
                return
            except ValueError as error:  # names differ, for example; nothing is written yet
                reason = str(error)
        # Otherwise transformers renames tensors, and a Trainer would not find them again.
        options["save_original_format"] = False
        type(self.model).save_pretrained(self.model, save_directory, *args, **options)
        if elsewhere:
            if not of_trainer:  # OuterSyncCallback writes those
                warnings.warn(
                    f"nothing was written to {folder}: transformers writes only at rank 0 of "
                    f"torch.distributed, and this is rank {dist.get_rank()}",
                    stacklevel=2,
                )
        elif mark(folder) and not of_trainer:
            warnings.warn(
                f"{folder} has the tensors of a converted model, which plain transformers does not "
                f"read: {reason or 'state_dict was given'}",
                stacklevel=2,
            )


def mark(folder: Path) -> bool:
    """Marks a folder's config.json: its tensors are not in the original format. Returns whether the
    folder has a config.json."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    config = json.loads(path.read_text(encoding="utf-8"))
    if not str(config.get("model_type")).startswith(_MARK):
        config["model_type"] = f"{_MARK}{config.get('model_type')}"
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return True


def attach(model: nn.Module, why_not: Callable[[Any], str], save: Callable[..., None]) -> None:
    """Adds hook and `save_pretrained` after a conversion; arguments as of `SaveConverted`."""
    if add_balance_loss not in model._forward_hooks.values():
        model.register_forward_hook(add_balance_loss, with_kwargs=True)
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = SaveConverted(model, why_not, save)  # type: ignore[assignment]


def detach(model: nn.Module) -> None:
    """Undoes `attach`."""
    for key in [k for k, hook in model._forward_hooks.items() if hook is add_balance_loss]:
        del model._forward_hooks[key]
        model._forward_hooks_with_kwargs.pop(key, None)
    if isinstance(vars(model).get("save_pretrained"), SaveConverted):
        del model.save_pretrained
