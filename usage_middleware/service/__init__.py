"""The WSGI application that command-line options describe: ``serve`` serves it, and other servers load it."""
