"""`fomoe eval`: validation of a run, an exported folder or a transformers model.

`models` recognises and loads the model, `command` evaluates it. May import export, checkpoint,
model, plan and what they stand on. Knows no training loop.
"""
