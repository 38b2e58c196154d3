"""A WSGI application that forwards to an HTTP service: the request, the exchange, the answer."""

from .proxy import Proxy as Proxy
