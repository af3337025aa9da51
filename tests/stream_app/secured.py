"""A real Kafka with TLS and SASL at its doors, one listener for each kind, and the certificates and users for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from stream_app.dev.kafka.broker import LocalBroker

USER = "shop"
#: Another one for each kind, so that a test sees which kind was used.
PLAIN_PASSWORD, SCRAM_PASSWORD = "c0rrect-horse", "tr0ub4dor&3"
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")

#: Listener → security protocol.
LISTENERS = {
    "TLS": "SSL",
    "MUTUAL": "SSL",
    "EXPIRED": "SSL",
    "LOCALHOST": "SSL",
    "SASL_TLS": "SASL_SSL",
    "SASL_OPEN": "SASL_PLAINTEXT",
    "SCRAM_ONLY": "SASL_PLAINTEXT",
}


@dataclass(frozen=True)
class SecuredKafka:
    """Where its doors are, and the files that open them."""

    broker: LocalBroker
    folder: Path

    def address(self, listener: str, host: str = "127.0.0.1") -> str:
        plain = int(self.broker.bootstrap.rsplit(":", 1)[1])
        return f"{host}:{plain if listener == 'PLAINTEXT' else self.broker.port_of(listener)}"

    def file(self, name: str) -> str:
        """`ca` and `foreign-ca`; `client`, `foreign-client`: key and certificate, signed by either."""
        return str(self.folder / f"{name}.pem")

    def tls(self, listener: str, ca: str = "ca", client: str | None = None) -> dict[str, str]:
        """Settings for a door with TLS."""
        settings = {"BROKER": self.address(listener), "SECURITY_PROTOCOL": "SSL", "TLS_CA_FILE": self.file(ca)}
        return settings if client is None else {**settings, **self.client(client)}

    def client(self, name: str) -> dict[str, str]:
        return {"TLS_CERT_FILE": self.file(name), "TLS_KEY_FILE": self.file(name)}

    def sasl(self, listener: str, mechanism: str, password: str | None = None) -> dict[str, str]:
        """Settings for a door with SASL, and with TLS where it has that."""
        tls = {"TLS_CA_FILE": self.file("ca")} if LISTENERS.get(listener) == "SASL_SSL" else {}
        right = PLAIN_PASSWORD if mechanism == "PLAIN" else SCRAM_PASSWORD
        return {
            "BROKER": self.address(listener),
            "SECURITY_PROTOCOL": LISTENERS.get(listener, "SASL_PLAINTEXT"),
            "SASL_MECHANISM": mechanism,
            "SASL_USERNAME": USER,
            "SASL_PASSWORD": password or right,
            **tls,
        }


@contextmanager
def secured_kafka(folder: Path) -> Iterator[SecuredKafka]:
    """Started, and killed at the end with its data."""
    _write_certificates(folder)
    broker = LocalBroker(
        folder / "data",
        port=0,
        listeners=LISTENERS,
        properties=_properties(folder),
        scram_users={USER: SCRAM_PASSWORD},
    )
    broker.start()
    try:
        yield SecuredKafka(broker, folder)
    finally:
        broker.kill()


def _properties(folder: Path) -> dict[str, str]:
    jaas = "org.apache.kafka.common.security"
    plain = f'{jaas}.plain.PlainLoginModule required user_{USER}="{PLAIN_PASSWORD}";'
    scram = f"{jaas}.scram.ScramLoginModule required;"
    sasl = [name for name, protocol in LISTENERS.items() if protocol.startswith("SASL")]
    modules = {
        f"listener.name.{listener.lower()}.{mechanism.lower()}.sasl.jaas.config": plain
        if "PLAIN" in mechanism
        else scram
        for listener in sasl
        for mechanism in MECHANISMS
    }
    return {
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(folder / "kafka.pem"),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(folder / "ca.pem"),
        "listener.name.mutual.ssl.client.auth": "required",
        **{
            f"listener.name.{name}.ssl.keystore.{key}": value
            for name in ("expired", "localhost")
            for key, value in {"type": "PEM", "location": str(folder / f"{name}.pem")}.items()
        },
        "sasl.enabled.mechanisms": ",".join(MECHANISMS),
        "listener.name.scram_only.sasl.enabled.mechanisms": "SCRAM-SHA-256",
        **modules,
    }


def _write_certificates(folder: Path) -> None:
    now = datetime.now(UTC)
    ours, foreign = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(folder / "ca.pem")
    foreign.cert_pem.write_to_path(folder / "foreign-ca.pem")
    _write(folder / "kafka.pem", ours.issue_cert("127.0.0.1"))
    _write(folder / "localhost.pem", ours.issue_cert("localhost"))
    yesterday = now - timedelta(days=1)
    _write(
        folder / "expired.pem", ours.issue_cert("127.0.0.1", not_before=now - timedelta(days=9), not_after=yesterday)
    )
    _write(folder / "client.pem", ours.issue_cert("client.example"))
    _write(folder / "foreign-client.pem", foreign.issue_cert("client.example"))


def _write(file: Path, certificate: trustme.LeafCert) -> None:
    """Key and chain in one file; Java reads keys as PKCS #8 alone."""
    key = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    chain = b"".join(part.bytes() for part in certificate.cert_chain_pems)
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + chain)
