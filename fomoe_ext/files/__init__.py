"""What is on disk and how it is read and written: whole or not at all, sealed, never a pickle.

Tensors, states, JSON values, locks of folders, what could not be written. Stands on the ground: it
knows bytes and names, not what they mean to a job.
"""
