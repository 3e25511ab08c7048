"""Files that `fomoe export` copies into a folder as they are: they need torch and transformers, and
nothing of fomoe_ext.
"""
