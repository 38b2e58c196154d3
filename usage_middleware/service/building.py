"""The WSGI application that options describe."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from werkzeug.middleware.dispatcher import DispatcherMiddleware

from ..stores.base import QuotaStore
from ..wsgi.authentication import bearer_key, llm_key
from ..wsgi.endpoints.new_api import NewAPI
from ..wsgi.endpoints.not_found import NotFound
from ..wsgi.meter.costs import Cost, FromHeader, PerRequest
from ..wsgi.meter.llm_usage import LLMUsage
from ..wsgi.meter.request_body import requested_model
from ..wsgi.meter.usage_meter import UsageMeter
from ..wsgi.middleware import UsageMiddleware
from ..wsgi.proxy import Proxy
from .loading import load_application
from .options import ServiceOptions

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from ..wsgi.metrics import Metrics

_VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_OF_UPSTREAM: Final = ("upstream_headers", "upstream_timeout", "keep_key")
_COSTS: Final = ("cost", "cost_header", "llm")
_OF_NEW_API: Final = ("quota_per_unit", "display", "system_name")


def build(store: Any, options: ServiceOptions, metrics: Metrics | None = None) -> WSGIApplication:
    """Return the endpoint in front of the application or service. If requests are charged, the meter is in between.

    :param store: the opened database. It is not used here.
    :param metrics: counts requests; left out, one is made if the options ask for it.
    :raises ValueError: the options do not go together, or one cannot be used; the message names it.
    :raises ImportError: a package that an option needs is not installed.
    """
    _check(options)
    allow_origins = () if options.no_cors else "*" if options.origins in ((), ("*",)) else options.origins
    of_refusals: dict[str, Any] = {
        "allow_origins": allow_origins,
        "throttle": options.throttle,
        "throttle_storage": options.throttle_storage or "memory://",
    }
    is_alone = options.application is None and options.upstream is None
    with_new_api = is_alone if options.with_new_api is None else options.with_new_api
    if metrics is None and options.metrics_path is not None:
        metrics = make_metrics(store)
    middleware = UsageMiddleware(
        _metered(store, options, of_refusals, metrics),
        store,
        path=options.path,
        page=page_path(options),
        new_api=NewAPI(**_given(options, _OF_NEW_API)) if with_new_api else None,
        **of_refusals,
    )
    if metrics is None or options.metrics_path is None:
        return middleware
    return DispatcherMiddleware(middleware, {options.metrics_path.rstrip("/"): metrics.app})


def make_metrics(store: Any) -> Metrics:
    """Return the metrics of a service, in a registry of their own.

    :raises ValueError: a store of this kind does not have metrics.
    :raises ImportError: the package that they need is not installed.
    """
    from ..wsgi.metrics import Metrics

    if not isinstance(store, QuotaStore):
        raise ValueError("this is a database of new-api, of which there are no metrics")
    from prometheus_client import CollectorRegistry

    return Metrics(store, registry=CollectorRegistry())


def page_path(options: ServiceOptions) -> str | None:
    """Return the path of the page. A service without an application shows it at its root."""
    is_alone = options.application is None and options.upstream is None
    return "/" if options.page is None and is_alone and options.path != "/" else options.page


def _metered(
    store: Any, options: ServiceOptions, of_refusals: dict[str, Any], metrics: Metrics | None
) -> WSGIApplication:
    """Return the application behind the endpoint, with the meter in front of it if requests are charged."""
    if options.upstream is not None:
        wrapped: WSGIApplication = _proxy(options.upstream, options)
    elif options.application is not None:
        wrapped = load_application(options.application)
    else:
        return NotFound(of_refusals["allow_origins"])
    if not _is_metered(options):
        return wrapped
    if not isinstance(store, QuotaStore):
        raise ValueError("this is a database of new-api, which is only read: it cannot be charged for requests")
    return UsageMeter(
        wrapped,
        store,
        cost=_cost(options),
        exempt=options.exempt,
        model=requested_model if options.llm else None,
        key=llm_key if options.llm else bearer_key,
        # The service does not need the caller's key. An application in the same process has it either way.
        forward_key=options.keep_key or options.upstream is None,
        on_settled=None if metrics is None else metrics.on_settled,
        on_refused=None if metrics is None else metrics.on_refused,
        **of_refusals,
    )


def _proxy(url: str, options: ServiceOptions) -> Proxy:
    timeout = {} if options.upstream_timeout is None else {"read_timeout": options.upstream_timeout}
    headers = dict(map(_header, options.upstream_headers))
    try:
        return Proxy(url, headers=headers, **timeout)
    except ValueError as error:
        raise ValueError(f"--upstream cannot be used: {error}") from None


def _header(text: str) -> tuple[str, str]:
    """Return the name and the value of a header, with ``${VARIABLE}`` replaced from the environment.

    No message quotes the text or the value, which may be a secret.
    """
    name, separator, value = text.partition(":")
    if not separator or not name.strip():
        raise ValueError("--upstream-header must have the form 'Name: ${VARIABLE}'")

    def replaced(match: re.Match[str]) -> str:
        try:
            return os.environ[match[1]]
        except KeyError:
            raise ValueError(f"--upstream-header needs the environment variable {match[1]}, which is not set") from None

    return name.strip(), _VARIABLE.sub(replaced, value.strip())


def _cost(options: ServiceOptions) -> Cost:
    if options.llm:
        prices: dict[str, Any] = {
            name: price
            for name, price in (("input", options.input_price), ("output", options.output_price))
            if price is not None
        }
        assert options.reserve is not None
        # OpenAI-compatible services state the usage of a stream only if asked.
        return LLMUsage(most=options.reserve, ask=True, **prices)
    if options.cost_header is not None:
        assert options.reserve is not None
        return FromHeader(options.cost_header, most=options.reserve)
    return PerRequest(1 if options.cost is None else options.cost)


def _is_metered(options: ServiceOptions) -> bool:
    return options.upstream is not None or bool(_given(options, _COSTS))


def _check(options: ServiceOptions) -> None:
    """Raise :exc:`ValueError` if options do not go together."""
    for one, other in (("application", "upstream"), ("origins", "no_cors")):
        if _given(options, (one, other)).keys() == {one, other}:
            raise ValueError(f"{_shown(one)} and {_shown(other)} exclude each other")
    costs = list(_given(options, _COSTS))
    if len(costs) > 1:
        raise ValueError(f"{_shown(costs[0])} and {_shown(costs[1])} exclude each other")
    _need(options, _OF_UPSTREAM, options.upstream is not None, "--upstream")
    _need(options, _COSTS, options.application is not None or options.upstream is not None, "--upstream or --app")
    _need(options, ("reserve",), options.llm or options.cost_header is not None, "--cost-header or --llm")
    _need(options, ("input_price", "output_price"), options.llm, "--llm")
    _need(options, ("exempt",), _is_metered(options), "--upstream or a cost")
    if options.metrics_path is not None and not options.metrics_path.startswith("/"):
        raise ValueError(f"--metrics-path must begin with '/', such as /metrics, got {options.metrics_path!r}")
    _need(options, ("throttle_storage",), options.throttle is not None, "a --throttle")
    is_alone = options.application is None and options.upstream is None
    _need(options, _OF_NEW_API, is_alone if options.with_new_api is None else options.with_new_api, "--new-api")
    if (options.llm or options.cost_header is not None) and options.reserve is None:
        raise ValueError(f"{_shown(costs[0])} needs --reserve, the most that a request can cost")


def _need(options: ServiceOptions, names: Iterable[str], is_met: bool, what: str) -> None:
    given = list(_given(options, names))
    if given and not is_met:
        raise ValueError(f"{_shown(given[0])} needs {what}")


def _given(options: ServiceOptions, names: Iterable[str]) -> dict[str, Any]:
    """Return the options that were given, by their names."""
    values = ((name, getattr(options, name)) for name in names)
    return {name: value for name, value in values if value is not None and value is not False and value != ()}


def _shown(name: str) -> str:
    return _NAMES.get(name, f"--{name.replace('_', '-')}")


_NAMES: Final = {
    "application": "--app",
    "origins": "--allow-origin",
    "upstream_headers": "--upstream-header",
}
