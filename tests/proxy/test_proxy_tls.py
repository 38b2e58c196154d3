"""A service behind TLS: its certificate is verified, and the same passes as without TLS."""

from __future__ import annotations

import datetime
import io
import ipaddress
import ssl

import pytest
from client import call, environ
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from raw_service import answering, serving

from usage_middleware import Proxy

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
NOW = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Return a function that makes a self-signed certificate, and returns the path of a file with it and its key."""

    def make(name="127.0.0.1", *, until=NOW + DAY):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
        try:
            host = x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            host = x509.DNSName(name)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - 2 * DAY)
            .not_valid_after(until)
            .add_extension(x509.SubjectAlternativeName([host]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        path = tmp_path_factory.mktemp("certificate") / "certificate.pem"
        path.write_bytes(
            made.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return path

    return make


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"])
def version(request):
    return request.param


def tls(path, version=ssl.TLSVersion.TLSv1_3):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(path)
    return context


def url(service, host="127.0.0.1"):
    return f"https://{host}:{service.port}"


def test_a_service_with_a_valid_certificate_is_asked(certificate, version, monkeypatch):
    path = certificate()
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with serving(answering(OK), tls=tls(path, version)) as service:
        body = {"wsgi.input": io.BytesIO(b"abc"), "CONTENT_LENGTH": "3"}
        answer = call(Proxy(url(service)), environ("POST", "/x", **body))
        start, headers, received = service.result()

    assert (answer.status, answer.body) == (200, b"ok")
    assert (start, headers[0], received) == ("POST /x HTTP/1.1", ("Host", f"127.0.0.1:{service.port}"), b"abc")


@pytest.mark.parametrize("case", ["unknown authority", "another host", "expired", "no TLS"])
def test_a_service_that_cannot_be_verified_is_not_asked(certificate, case, monkeypatch, caplog):
    path = certificate(
        "other.example" if case == "another host" else "127.0.0.1", until=NOW - DAY if case == "expired" else NOW + DAY
    )
    if case != "unknown authority":
        monkeypatch.setenv("SSL_CERT_FILE", str(path))

    def without_tls(connection):
        connection.send(OK)
        return connection.rest()

    context = None if case == "no TLS" else tls(path)
    with serving(answering(OK) if context else without_tls, tls=context) as service:
        answer = call(Proxy(url(service), headers={"Authorization": "Bearer hidden"}), environ())
        if context is None:
            assert b"hidden" not in service.result()
        else:
            with pytest.raises((ssl.SSLError, ConnectionResetError)):
                service.result()

    assert (answer.status, answer.json["error"]["code"]) == (502, "bad_gateway")
    assert "hidden" not in caplog.text


def test_a_refusal_before_the_body_is_read_is_passed_on(certificate, version, monkeypatch):
    def handle(connection):
        connection.head()
        connection.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nno!")
        return connection.is_closed_by_peer()

    path = certificate()
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    size = 64 * 1024 * 1024
    body = io.BytesIO(bytes(size))
    with serving(handle, tls=tls(path, version)) as service:
        answer = call(Proxy(url(service)), environ("POST", CONTENT_LENGTH=str(size), **{"wsgi.input": body}))
        service.result()

    assert (answer.status, answer.body) == (413, b"no!")


def test_a_service_may_answer_while_it_reads(certificate, version, monkeypatch):
    def handle(connection):
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for chunk in connection.chunks():
            connection.send(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        connection.send(b"0\r\n\r\n")

    path = certificate()
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    sent = bytes(range(256)) * 16 * 1024
    variables = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True, "wsgi.input": io.BytesIO(sent)}
    with serving(handle, tls=tls(path, version)) as service:
        answer = call(Proxy(url(service)), environ("POST", **variables))
        service.result()

    assert answer.body == sent
