"""Text as tokens: `text` finds, reads and tokenizes it, `cache` stores the tokens, `sequences`
makes batches.

A text is a file, a line of a .jsonl file or a row of a parquet file. Tokens are bytes, or come from
a tokenizer.json. May import config, files and extras. Knows no model, and of sites only their
numbers.
"""
