"""The store over a new-api database, which it only reads."""
