"""`fomoe plan`: what a job costs, in bytes, memory, FLOPs and seconds, before it is trained.

traffic (bytes), memory, experts (their memory in a step), disk and cost (FLOPs, seconds) are the
model, of sizes, which hf reads of other models; jobs and fit compare, report, plot and command
tell, args reads flags. May import report, config, placement and files; needs no torch and knows
nothing of what trains. What it predicts, tests compare with what training counts.
"""
