"""The study behind `docs/claims.md`: the FoMoE paper's claims, tested at a size that trains on two
CPU cores.

Run `python -m bench.study all` in the root of the repository; `--help` lists the other tables.
"""
