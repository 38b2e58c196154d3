"""The store over an SQLite file."""
