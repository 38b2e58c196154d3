"""The usage endpoint for an application that must not be changed: old_application.py stays as it is.

    pip install .
    python examples/wrap_old_application.py [PORT]

Then run the curl command that it prints. Tokens are kept in the file that USAGE_MIDDLEWARE_DB names, or in tokens.db.
In the folder of old_application.py, the command does the same without this file:

    usage-middleware create --db tokens.db --name Demo --quota 1000000
    usage-middleware serve --db tokens.db --app old_application:application
"""

import os
import sys

from old_application import application as old_application
from werkzeug.serving import run_simple

from usage_middleware import SQLiteTokenStore, UsageMiddleware

store = SQLiteTokenStore(os.environ.get("USAGE_MIDDLEWARE_DB", "tokens.db"))
application = UsageMiddleware(old_application, store)

if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    key, _ = store.create(name="Demo", total_available=1_000_000)
    print(f"curl -H 'Authorization: Bearer {key}' http://127.0.0.1:{port}/api/usage/token", flush=True)
    run_simple("127.0.0.1", port, application, threaded=True)
