"""Multiple-choice sets: one small file per family, found by its name.

What lives here: `SETS` (names that `bundled.fetch` knows), `BY_LENGTH` (whether a choice's log-likelihood is divided
by its length in bytes) and `item(row) -> Item`, which turns one row of the data into text. What may not: scoring.
"""
