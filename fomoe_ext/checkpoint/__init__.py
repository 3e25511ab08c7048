"""Checkpoints: what they hold, how they are written behind the training, and read again.

`manifest` says what one is, `state` what it holds of a training, `writer` begins one (staging,
file_writer, pending, publish), `whole`, `reader` and `resume` find it, read it and go on from it.
May import outer, layer, launch, placement and files. What is saved of a training it is told by an
interface (`state.TrainingRank`); it knows no trainer, and nobody who exports or evaluates.
"""
