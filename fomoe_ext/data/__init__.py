"""Text as tokens: text finds and reads it, cache keeps the tokens, sequences cuts batches.

A text is a file, a line of a .jsonl file or a row of a parquet file. Tokens are bytes, or those of
a `tokenizers` file. May import config, files and extras. Knows no model and no site but by its
number.
"""
