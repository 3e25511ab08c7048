"""`fomoe plan`: what a job costs, in bytes, memory, FLOPs and seconds, before it is trained.

traffic (bytes), memory, experts (their memory in a step), disk and cost (FLOPs, seconds) are the
cost model; sizes has a model's sizes, and hf reads those of other models. jobs and fit compare
jobs; report, plot and command show the result, args reads flags. May import report, config,
placement and files; needs no torch and knows no trainer. Tests compare the predictions with what
training jobs count.
"""
