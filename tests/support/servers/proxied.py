"""A proxy for real servers to serve. ``UPSTREAM`` is the URL of the service."""

import os

from usage_middleware import Proxy

app = Proxy(os.environ["UPSTREAM"], read_timeout=10)
