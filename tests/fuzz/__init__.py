"""Damaged and hostile inputs for every parser of what comes from disk or wire.

`parsers.py` lists them, `mutate.py` damages valid inputs; `test_parsers.py` tries some hundreds of
each in the suite, `python -m tests.fuzz.run` any number.
"""
