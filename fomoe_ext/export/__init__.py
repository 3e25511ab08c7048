"""`fomoe export`: a run's global model as one folder; `exported/` is copied into it.

May import checkpoint, model and report. Knows no training loop.
"""
