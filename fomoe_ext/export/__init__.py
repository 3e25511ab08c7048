"""`fomoe export`: a run's global model as one folder; `exported/` is copied into it.

source says what is exported, command writes it: format (names, config.json), tokenizer, card
(README.md). May import checkpoint, model, report and what they stand on. Knows no training loop.
"""
