"""The study behind `docs/claims.md`: the FoMoE paper's claims at a size that two cores train.

`python -m bench.study all` in the root of the repository; `--help` says what else.
"""
