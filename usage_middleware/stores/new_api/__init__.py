"""The store over a database of new-api, which is only read."""
