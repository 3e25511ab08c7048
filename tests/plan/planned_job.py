"""Configurations that the tests plan."""

from __future__ import annotations

import dataclasses

from fomoe_ext.config.job import TrainConfig, preset_config


def config_of(preset: str = "tiny", **sections: dict) -> TrainConfig:
    """The dataclasses' own defaults, or a preset of the paper."""
    config = TrainConfig() if preset == "tiny" else preset_config(preset)
    changes = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in sections.items()
    }
    return dataclasses.replace(config, **changes)
