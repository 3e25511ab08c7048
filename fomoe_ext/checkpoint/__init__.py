"""Checkpoints: what they hold, how they are written behind the training, and read again.

May import outer, layer, report, launch, placement and files. What is saved of a training it is told
by an interface (`state.TrainingRank`); it knows no trainer, and nobody who exports or evaluates.
"""
