"""Why Kafka doesn't let a client in, in one line that names the settings to check.

Of TLS, SASL and wrong ports alike aiokafka's clients say that they can't bootstrap; the reason is in their log alone.
So whoever failed knocks once more, by a bare connection to each server, and looks at what comes back.
"""

from __future__ import annotations

import ssl
from typing import Any

from aiokafka.conn import create_conn
from aiokafka.errors import IllegalSaslStateError, KafkaError, SaslAuthenticationFailed, UnsupportedSaslMechanismError
from aiokafka.protocol.metadata import MetadataRequest

from stream_app.errors import AccessRefused, BrokerUnavailable
from stream_app.settings import Settings

# OpenSSL's verification codes, of which Python's ssl has no names.
_NOT_YET_VALID, _EXPIRED = 9, 10
_ANOTHER_NAME, _ANOTHER_ADDRESS = 62, 64


async def find_refusal(settings: Settings) -> BrokerUnavailable | None:
    """What keeps these settings out, at a bootstrap server or at a broker that it names.

    None where nobody listens, or nothing is wrong any more. The caller holds the deadline.
    """
    connection = settings.kafka_client()
    servers = [_host_and_port(server) for server in connection.pop("bootstrap_servers")]
    knocked = set()
    while servers:
        host, port = servers.pop(0)
        knocked.add((host, port))
        try:
            brokers = await _brokers(host, port, connection)
        except (OSError, KafkaError) as error:
            if refusal := _explained(settings, f"Kafka at {host}:{port}", error.__cause__ or error):
                return refusal
        else:
            servers += [broker for broker in brokers if broker not in knocked]
    return None


def _host_and_port(server: str) -> tuple[str, int]:
    host, port = server.rsplit(":", 1)
    return host.strip("[]"), int(port)


async def _brokers(host: str, port: int, connection: dict[str, Any]) -> list[tuple[str, int]]:
    """The brokers that a server names, as they want to be reached."""
    client = await create_conn(host, port, **connection)
    try:
        answer = await client.send(MetadataRequest([]))
    finally:
        await client.close()
    return [(broker[1], broker[2]) for broker in answer.brokers]


def _explained(settings: Settings, kafka: str, error: BaseException) -> BrokerUnavailable | None:
    if words := _refused(settings, error):
        return AccessRefused(f"{kafka} {words}")
    if isinstance(error, (ssl.SSLError, EOFError, ConnectionResetError, BrokenPipeError)):
        return BrokerUnavailable(
            f"{kafka} broke the connection off, as a port does that speaks another protocol; "
            + _check_protocol(settings)
        )
    return None


def _refused(settings: Settings, error: BaseException) -> str | None:
    """What is wrong for certain: asked again, the answer would be the same."""
    match error:
        case ssl.SSLCertVerificationError():
            return f"shows a certificate {_why_not_trusted(settings, error)}"
        case ssl.SSLError(reason=str(reason)) if "ALERT" in reason and ("CERTIFICATE" in reason or "_CA" in reason):
            return _why_not_known(settings, reason)
        case SaslAuthenticationFailed():
            return (
                f"does not let user {settings.sasl_username!r} in ({error.args[0]}); check STREAM_APP_SASL_USERNAME, "
                f"STREAM_APP_SASL_PASSWORD and STREAM_APP_SASL_MECHANISM={settings.sasl_mechanism}"
            )
        case UnsupportedSaslMechanismError():
            return (
                f"does not take STREAM_APP_SASL_MECHANISM={settings.sasl_mechanism}; "
                "choose one that its listener has enabled"
            )
        case IllegalSaslStateError():
            return f"wants no SASL at this port; {_check_protocol(settings)}"
    return None


def _why_not_trusted(settings: Settings, error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in {_ANOTHER_NAME, _ANOTHER_ADDRESS}:
        return (
            f"for another name ({error.verify_message.rstrip('.')}); STREAM_APP_BROKER and Kafka's "
            "advertised.listeners must name it as its certificate does"
        )
    if error.verify_code in {_EXPIRED, _NOT_YET_VALID}:
        return f"out of its time ({error.verify_message}); give Kafka a new one, or set this machine's clock"
    known = f"in STREAM_APP_TLS_CA_FILE={settings.tls_ca_file}" if settings.tls_ca_file else "of this system"
    return (
        f"that no authority {known} has signed ({error.verify_message}); "
        "name by STREAM_APP_TLS_CA_FILE the PEM file of the authority that has"
    )


def _why_not_known(settings: Settings, reason: str) -> str:
    said = reason.partition("ALERT_")[2].lower().replace("_", " ")
    if settings.tls_cert_file is None:
        return f"wants a client's certificate ({said}); set STREAM_APP_TLS_CERT_FILE and STREAM_APP_TLS_KEY_FILE"
    return (
        f"refuses the certificate in STREAM_APP_TLS_CERT_FILE={settings.tls_cert_file} ({said}); "
        "it has expired, or Kafka does not know the authority that signed it"
    )


def _check_protocol(settings: Settings) -> str:
    protocol = f"check STREAM_APP_SECURITY_PROTOCOL={settings.security_protocol} and the port in STREAM_APP_BROKER"
    if "SSL" in settings.security_protocol and settings.tls_cert_file is None:
        # A client without a certificate may see the connection end before it reads why.
        return f"{protocol}, and whether STREAM_APP_TLS_CERT_FILE is wanted"
    return protocol
