"""The typed configuration of a job: a section each, presets, files and flags, what has no effect.

Also values as text: links and addresses. May import placement and files; starts and trains nothing,
and needs no torch.
"""
