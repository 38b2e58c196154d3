"""The store over a database server, by SQLAlchemy."""
