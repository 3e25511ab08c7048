"""`fomoe plan`: what a job costs, in bytes, memory, FLOPs and seconds, before it is trained.

May import report, config and placement. Needs no torch: what it predicts, tests compare with what
training counts.
"""
