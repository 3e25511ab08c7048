"""Text as tokens: found, read, tokenised, and cut into training batches.

May import config and files. Knows no model and no site but by its number.
"""
