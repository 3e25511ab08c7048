"""Fault tolerance: a job continues when sites are lost, and takes in sites that join late.

`membership` agrees on the sites that take part, through the `lighthouse` that `keeper` runs for the
launcher. `ownership` computes who holds which expert. `reform` carries out a change: it rebuilds
groups and models, with lost experts from `shadows` or a checkpoint (`recovery`). `company` decides
when. May import checkpoint, outer, model and what they stand on; knows a training site only by its
interface (`site`).
"""
