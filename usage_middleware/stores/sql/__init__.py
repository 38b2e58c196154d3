"""The store over a database server, with SQLAlchemy."""
