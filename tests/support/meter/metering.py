"""A metered application, called as a server calls it, step by step."""

from __future__ import annotations

import io
import sys

from client import environ

from usage_middleware import UsageMeter, bearer_key

KEY = "k" * 20


class Served:
    """One request to a metered application.

    :param meter: the application. The constructor calls it.
    """

    def __init__(self, meter, method="GET", path="/work", key=KEY, body=b"", **variables):
        if key is not None:
            variables.setdefault("HTTP_AUTHORIZATION", f"Bearer {key}")
        if body:
            variables.setdefault("CONTENT_LENGTH", str(len(body)))
            variables["wsgi.input"] = io.BytesIO(body)
        self.environ = environ(method, path, **variables)
        self.heads = []
        self.written = []
        self.result = meter(self.environ, self.start_response)
        self.iterator = None

    def start_response(self, status, headers, exc_info=None):
        if exc_info and self.written:
            raise exc_info[1].with_traceback(exc_info[2])
        self.heads.append((status, headers))
        return self.written.append

    @property
    def status(self):
        return int(self.heads[-1][0].partition(" ")[0])

    @property
    def headers(self):
        return self.heads[-1][1]

    def next(self):
        """Return the next chunk, as a server asks for it."""
        if self.iterator is None:
            self.iterator = iter(self.result)
        chunk = next(self.iterator)
        if chunk:
            self.written.append(chunk)
        return chunk

    def rest(self):
        for _ in iter(self.next, object()):
            pass

    def close(self):
        close = getattr(self.result, "close", None)
        if close is not None:
            close()

    def finish(self):
        """Send all of it, as servers do, and return the body."""
        try:
            for chunk in self.result:
                if chunk:
                    self.written.append(chunk)
        finally:
            self.close()
        return b"".join(self.written)


class Host:
    """An application that answers with what a test has set, and records how it was called."""

    def __init__(self, chunks=(b"done",), status="200 OK", headers=(), *, late=False):
        self.chunks = chunks
        self.status = status
        self.headers = [("Content-Type", "text/plain"), *headers]
        self.late = late
        self.environ = None
        self.closed = 0
        self.on_chunk = lambda number: None

    def __call__(self, environ, start_response):
        self.environ = environ
        if not self.late:
            start_response(self.status, list(self.headers))
        return _Answer(self, start_response)


class _Answer:
    """An iterable that is not its own iterator. Only its close() is counted, not that of the iterator."""

    def __init__(self, host, start_response):
        self._host = host
        self._start_response = start_response

    def __iter__(self):
        host = self._host
        if host.late:
            self._start_response(host.status, list(host.headers))
        for number, chunk in enumerate(host.chunks):
            host.on_chunk(number)
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk

    def close(self):
        self._host.closed += 1


class Metered:
    """A store with one token, an application and the meter between them."""

    def __init__(self, store, app=None, *, total_available=1000, key=KEY, find_key=bearer_key, **arguments):
        self.store = store
        _, token = store.create(key=key, total_available=total_available, name="holder")
        self.token_id = token.id
        self.settlements = []
        self.app = Host() if app is None else app
        self._arguments = {"on_settled": self.settlements.append, "key": find_key, **arguments}
        self.meter = UsageMeter(self.app, store, **self._arguments)

    def change(self, **arguments):
        """Replace the meter by one that has other arguments too."""
        self.meter = UsageMeter(self.app, self.store, **self._arguments, **arguments)

    def serve(self, *arguments, **options):
        return Served(self.meter, *arguments, **options)

    @property
    def token(self):
        return self.store.get_by_id(self.token_id)

    @property
    def used(self):
        """Return what is used by the ledger. Check that nothing is open and that the settlements add up to it."""
        token = self.token
        assert not list(self.store.open_reservations())
        assert token.total_used == sum(s.units for s in self.settlements)
        return token.total_used

    @property
    def settlement(self):
        (settlement,) = self.settlements
        return settlement

    def settled(self):
        """Return the units, the basis and the outcome of the settlement."""
        assert self.used == self.settlement.units
        return self.settlement.units, self.settlement.basis, self.settlement.outcome


def interrupted(error):
    """Return a function that runs another while an exception is handled, as a server closes an answer."""

    def run(function):
        try:
            raise error
        except type(error):
            assert sys.exc_info()[1] is error
            function()

    return run
