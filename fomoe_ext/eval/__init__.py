"""`fomoe eval`: validation of a run, an exported folder or a transformers model.

May import export, checkpoint and model. Knows no training loop.
"""
