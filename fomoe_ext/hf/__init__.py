"""fomoe_ext in transformers' models: MoE blocks become `MoELayer`s, and blocks again.

    from fomoe_ext import hf

    hf.convert(model, placement=placement, site=site)    # in place; weights move, nothing is copied
    loaded = hf.from_pretrained_resident(folder, placement, site)    # reads resident experts only
    hf.restore(model)                                    # the original blocks, bit for bit
    hf.save_pretrained(model, folder)                    # in the original format
    hf.save_merged(model, placement, site, folder)       # of all sites' experts, one model

Known are Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3 and gpt-oss; `register` adds a family.
Needs transformers 5.6 or later. May import outer, layer and what is below. Knows nothing of
`fomoe train`: its model, jobs and checkpoints.
"""

from fomoe_ext.hf.convert import convert
from fomoe_ext.hf.converted import layers
from fomoe_ext.hf.families import Family, families, register
from fomoe_ext.hf.load import Loaded, from_pretrained_resident
from fomoe_ext.hf.merge import save_merged
from fomoe_ext.hf.restore import restore, save_pretrained

__all__ = [
    "Family",
    "Loaded",
    "convert",
    "families",
    "from_pretrained_resident",
    "layers",
    "register",
    "restore",
    "save_merged",
    "save_pretrained",
]
