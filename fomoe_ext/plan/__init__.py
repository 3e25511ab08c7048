"""`fomoe plan`: what a job costs, in bytes, memory, FLOPs and seconds, before it is trained.

traffic (bytes), memory, disk and cost (FLOPs, seconds) are the cost model. jobs and fit compare
jobs; report, plot and command show the result. May import report, config, placement and files;
needs no torch and knows no trainer. Tests compare the predictions with what training
jobs count.
"""
