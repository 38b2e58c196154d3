"""What a meter charges, as metrics of OpenTelemetry: ten lines on `on_settled`.

    pip install . opentelemetry-api
    python examples/meter_opentelemetry.py [PORT]

Then run the curl commands that it prints. Tokens are kept in the file that USAGE_MIDDLEWARE_DB names, or in tokens.db.
With opentelemetry-sdk and an exporter, as `opentelemetry-instrument` sets them up, the metrics go where your other
metrics go.
"""

import os
import sys

from opentelemetry import metrics
from werkzeug.serving import run_simple
from werkzeug.wrappers import Response

from usage_middleware import Settlement, SQLiteTokenStore, UsageMeter, UsageMiddleware

otel = metrics.get_meter("usage_middleware")
requests = otel.create_counter("usage.requests", description="metered requests that were answered")
units = otel.create_counter("usage.units", description="quota units that were charged")
added = otel.create_histogram("usage.added", unit="s", description="how long the meter itself took")


def on_settled(settlement: Settlement) -> None:
    requests.add(1, {"outcome": settlement.outcome})
    units.add(settlement.units, {"model": settlement.model or ""})
    added.record(settlement.added)


store = SQLiteTokenStore(os.environ.get("USAGE_MIDDLEWARE_DB", "tokens.db"))
application = UsageMiddleware(UsageMeter(Response("the application itself"), store, on_settled=on_settled), store)

if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    key, _ = store.create(name="Demo", total_available=1_000_000)
    print(f"curl -H 'Authorization: Bearer {key}' http://127.0.0.1:{port}/api/usage/token")
    print(f"curl -H 'Authorization: Bearer {key}' http://127.0.0.1:{port}/", flush=True)
    run_simple("127.0.0.1", port, application, threaded=True)
