"""`fomoe eval`: validation of a run, an exported folder or a transformers model.

models finds out what it is given and loads it, command measures. May import export, checkpoint,
model, plan and what they stand on. Knows no training loop.
"""
