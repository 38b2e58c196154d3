"""A Django project in one file, with the usage endpoint.

    pip install . django
    python examples/django_project.py [PORT]

Then run the curl command that it prints. Tokens are kept in the file that USAGE_MIDDLEWARE_DB names, or in tokens.db.
In a project with several files, add the lines for `store` and `application` to its wsgi.py.
"""

import os
import sys

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path
from werkzeug.serving import run_simple

from usage_middleware import SQLiteTokenStore, UsageMiddleware

settings.configure(ALLOWED_HOSTS=["127.0.0.1", "localhost"], ROOT_URLCONF=__name__)


def index(request: HttpRequest) -> HttpResponse:
    return HttpResponse("Hello from Django.\n")


urlpatterns = [path("", index)]

store = SQLiteTokenStore(os.environ.get("USAGE_MIDDLEWARE_DB", "tokens.db"))
application = UsageMiddleware(get_wsgi_application(), store)

if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    key, _ = store.create(name="Demo", total_available=1_000_000)
    print(f"curl -H 'Authorization: Bearer {key}' http://127.0.0.1:{port}/api/usage/token", flush=True)
    run_simple("127.0.0.1", port, application, threaded=True)
