"""A price list from long ago: a plain WSGI application (PEP 3333) that does not know about tokens.

wrap_old_application.py adds the usage endpoint without changing this file.
"""

PRICES = [("Apples", 240), ("Pears", 310), ("Quinces", 450)]


def application(environ, start_response):
    if environ["PATH_INFO"] != "/":
        status, text = "404 Not Found", "There is only one page.\n"
    else:
        status, text = "200 OK", "".join("%-8s %5.2f\n" % (name, cents / 100) for name, cents in PRICES)
    body = text.encode("ascii")
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
