"""`fomoe export`: writes the global model of a run as one folder.

`source` finds the checkpoint and `command` writes the folder, with `format` (names, config.json),
`tokenizer` and `card` (README.md); the code in `exported/` is copied into it. May import
checkpoint, model, report and what they stand on. Knows no training loop.
"""
