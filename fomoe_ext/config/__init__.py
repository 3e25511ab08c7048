"""The typed configuration of a job: sections, presets, TOML files, flags, options without effect.

May import placement and files; starts nothing, knows no tensor and needs no torch. The names here
are for users; the package itself imports from the module that defines a name.

    sections         model, data, sites, inner, outer, run, fault; limits: ranges of their values
    all together     job (checks across sections), presets
    read, written    io; effects (options that do nothing), changes (in a resumed run),
                     vocabulary (token ids that the data never uses)
    values as text   links, addresses
"""

from fomoe_ext.config.data import DataConfig
from fomoe_ext.config.fault import FaultConfig
from fomoe_ext.config.inner import InnerConfig
from fomoe_ext.config.job import TrainConfig, preset_config
from fomoe_ext.config.model import ModelConfig, ParameterCounts, count_parameters
from fomoe_ext.config.outer import OuterConfig
from fomoe_ext.config.presets import PRESETS
from fomoe_ext.config.run import RunConfig
from fomoe_ext.config.sites import SitesConfig

__all__ = [
    "PRESETS",
    "DataConfig",
    "FaultConfig",
    "InnerConfig",
    "ModelConfig",
    "OuterConfig",
    "ParameterCounts",
    "RunConfig",
    "SitesConfig",
    "TrainConfig",
    "count_parameters",
    "preset_config",
]
