"""Reading and writing files: complete or not at all, with checksums, never as a pickle.

Tensors, states, JSON values, locks of folders, and a list of files that could not be written.
Stands on the ground: it knows bytes and names, not their meaning for a job.
"""
