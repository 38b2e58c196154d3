"""From words on a command line to a WSGI application: what ``serve`` serves, and what other servers load."""
