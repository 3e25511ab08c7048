"""The reference language model, and its validation across sites.

May import layer and what is below it. Knows no checkpoint and no training loop.
"""

from fomoe_ext.config.model import ModelConfig
from fomoe_ext.model.language import LanguageModel

__all__ = ["LanguageModel", "ModelConfig"]
