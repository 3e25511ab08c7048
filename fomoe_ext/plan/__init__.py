"""`fomoe plan`: what a job costs, in bytes, memory, FLOPs and seconds, before it is trained.

traffic (bytes), memory and cost (FLOPs, seconds) are the model; jobs and fit compare, report, plot
and command tell. May import report, config, placement and files; needs no torch and knows nothing
of what trains. What it predicts, tests compare with what training counts.
"""
