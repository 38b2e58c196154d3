"""Applications that throttle, and clients that guess keys."""

from client import ask, wrapped

from usage_middleware import Token, UsageMiddleware

KEY = "k3y"


BEARER = f"Bearer {KEY}"


WRONG = "Bearer wrong"


ADDRESS = "192.0.2.1"


PERIOD = 20 * 60


BEGIN = 1_800_000_000  # a multiple of the period: a window begins


LIMIT = "3 per 20 minutes"


# No window of it ends within a test that uses the real clock.
LONG_LIMIT = "20 per 30 days"


TOO_MANY = b'{"success":false,"message":"Too Many Requests"}'


class Clock:
    """A replacement for the module ``time``."""

    def __init__(self, now):
        self.now = now

    def time(self):
        return self.now

    def monotonic(self):
        return self.now


def make_app(limit=LIMIT, storage="memory://", store=None, **options):
    tokens = {KEY: Token(name="One"), "disabled": Token(enabled=False)}
    store = tokens if store is None else store
    return UsageMiddleware(wrapped, store, throttle=limit, throttle_storage=storage, **options)


def guess(app, authorization=WRONG, address=ADDRESS, **variables):
    return ask(app, authorization=authorization, REMOTE_ADDR=address, **variables)


def statuses(app, times, authorization=WRONG, address=ADDRESS):
    return [guess(app, authorization, address).status for _ in range(times)]
