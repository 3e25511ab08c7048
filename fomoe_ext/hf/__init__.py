"""transformers' models in fomoe_ext: their MoE blocks become `MoELayer`s, and can be turned back.

    from fomoe_ext import hf

    hf.convert(model, placement, site)  # in place: weights are moved, not copied
    model = hf.from_pretrained_resident(folder, placement, site)  # reads this site's experts only
    hf.restore(model)  # back to the original blocks, bit for bit
    hf.save_pretrained(model, folder)  # in the original format; needs all experts
    hf.save_merged(model, folder, placement, site)  # all sites together write one model

Supported families: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3 and gpt-oss; `register` adds
another. Needs transformers 5.6 or later. May import outer, layer and what is below. Knows nothing
of `fomoe train`: its model, jobs and checkpoints.
"""

from fomoe_ext.hf.convert import ConvertOptions, convert
from fomoe_ext.hf.converted import layers
from fomoe_ext.hf.families import Family, families, register
from fomoe_ext.hf.load import from_pretrained_resident
from fomoe_ext.hf.merge import save_merged
from fomoe_ext.hf.restore import restore, save_pretrained

__all__ = [
    "ConvertOptions",
    "Family",
    "convert",
    "families",
    "from_pretrained_resident",
    "layers",
    "register",
    "restore",
    "save_merged",
    "save_pretrained",
]
