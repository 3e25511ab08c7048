"""The reference language model, and its validation across sites.

language is a decoder of MoELayers, evaluate its loss where no site holds all experts. May import
layer and what is below it. Knows no meeting, no checkpoint and no training loop.
"""

from fomoe_ext.config.model import ModelConfig
from fomoe_ext.model.language import LanguageModel

__all__ = ["LanguageModel", "ModelConfig"]
