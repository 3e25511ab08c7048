"""Checkpoints: their content, writing them during training, and reading them.

`manifest` describes the format and `state` the content. `writer` starts a checkpoint (with staging,
file_writer, pending and publish). `whole`, `reader` and `resume` find it, read it and resume from
it. May import outer, layer, launch, placement and files. It knows training only by an interface
(`state.TrainingRank`), and nothing of trainer, export or evaluation.
"""
