"""`fomoe train`: before the start, one process of a job, and the loop of its site.

Stands on all the others but cli: steps, meetings, validation, checkpoints are made elsewhere and
put together here.
"""
