"""An OpenAI-compatible service whose tokens are charged, in JSON and in event streams.

    pip install .
    python examples/meter_llm.py [PORT]

Then run the curl commands that it prints. Tokens are kept in the file that USAGE_MIDDLEWARE_DB names, or in tokens.db.
The program starts a small service that stands in for a real one. To use a real one, set two variables:

    UPSTREAM_URL=https://llm.example UPSTREAM_KEY=… python examples/meter_llm.py

The command does the same without this file:

    usage-middleware serve --db tokens.db --upstream https://llm.example --llm --reserve 8000 --output-price 4 \
        --upstream-header 'Authorization: Bearer ${UPSTREAM_KEY}'
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from werkzeug.serving import run_simple

from usage_middleware import (
    LLMUsage,
    Proxy,
    SQLiteTokenStore,
    UsageMeter,
    UsageMiddleware,
    llm_key,
    requested_model,
)

ANSWER = ("Quinces", " are", " ripe.")


class LLMService(BaseHTTPRequestHandler):
    """Stand in for the real service. It counts words instead of tokens."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = sum(len(message["content"].split()) for message in asked["messages"])
        common = {"id": "chatcmpl-1", "created": 1767225600, "model": asked["model"]}
        usage = {"prompt_tokens": words, "completion_tokens": len(ANSWER), "total_tokens": words + len(ANSWER)}
        self.send_response(200)
        if not asked.get("stream"):
            message = {"role": "assistant", "content": "".join(ANSWER)}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            body = json.dumps({**common, "object": "chat.completion", "choices": choices, "usage": usage}).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in ANSWER:
            choices = [{"index": 0, "delta": {"content": word}, "finish_reason": None}]
            self._send_event({**common, "object": "chat.completion.chunk", "choices": choices})
        if asked.get("stream_options", {}).get("include_usage"):
            self._send_event({**common, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send_event(self, event: object) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, *_: object) -> None:
        """Leave logging to the server in front."""


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    store = SQLiteTokenStore(os.environ.get("USAGE_MIDDLEWARE_DB", "tokens.db"))
    key, _ = store.create(name="Demo", total_available=1_000_000)
    with ThreadingHTTPServer(("127.0.0.1", 0), LLMService) as service:
        Thread(target=service.serve_forever, daemon=True).start()
        upstream = Proxy(
            os.environ.get("UPSTREAM_URL", f"http://127.0.0.1:{service.server_port}"),
            headers={"Authorization": f"Bearer {os.environ.get('UPSTREAM_KEY', 'none')}"},
        )
        meter = UsageMeter(
            upstream,
            store,
            # A service states the usage of a stream only if asked. The client does not see that it was asked.
            cost=LLMUsage(most=8000, input=1, output=4, ask=True),
            model=requested_model,
            key=llm_key,
            forward_key=False,
        )
        application = UsageMiddleware(meter, store)
        request = '{"model": "fruit-1", "messages": [{"role": "user", "content": "What is ripe now?"}]}'
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        print(f"curl -H 'Authorization: Bearer {key}' http://127.0.0.1:{port}/api/usage/token")
        print(f"curl -H 'Authorization: Bearer {key}' -d '{request}' {url}")
        stream = request.replace("}]}", '}], "stream": true}')
        print(f"curl -N -H 'Authorization: Bearer {key}' -d '{stream}' {url}", flush=True)
        run_simple("127.0.0.1", port, application, threaded=True)
        service.shutdown()
