"""Environment → one frozen `Settings`, read once, at the edge."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from stream_app.errors import SettingsError

PREFIX = "STREAM_APP_"

_TOPIC_NAME = re.compile(r"[A-Za-z0-9._-]+")
_CHANGELOG_SUFFIX = "-user_state-changelog"
_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\s,:\[\]]+):(\d{1,5})")


@dataclass(frozen=True)
class _Kind:
    """How a setting's text becomes its value; `parse` raises ValueError on what is not `allowed`."""

    parse: Callable[[str], Any]
    allowed: str


def _kafka_servers(text: str) -> str:
    servers = [part.strip() for part in text.split(",")]
    matches = [_HOST_PORT.fullmatch(server) for server in servers]
    if not all(match and 0 < int(match[2]) < 65536 for match in matches):
        raise ValueError
    return ",".join(servers)


def _topic_name(longest: int, what: str = "a Kafka topic name") -> _Kind:
    def parse(text: str) -> str:
        if not _TOPIC_NAME.fullmatch(text) or len(text) > longest or text in {".", ".."}:
            raise ValueError
        return text

    return _Kind(parse, f"{what}: 1 to {longest} letters, digits, '.', '_' or '-'")


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError
    return text


def _boolean(text: str) -> bool:
    return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[text.lower()]


def _integer(low: int, high: int) -> _Kind:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return _Kind(parse, f"a whole number from {low:,} to {high:,}")


def _seconds(low: float, high: float) -> _Kind:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:  # also refuses NaN
            raise ValueError
        return value

    return _Kind(parse, f"seconds from {low:g} to {high:g}")


def _choice(*choices: str) -> _Kind:
    def parse(text: str) -> str:
        return {choice.lower(): choice for choice in choices}[text.lower()]

    return _Kind(parse, "one of " + ", ".join(choices))


_TOPIC = _topic_name(249)
_APP_ID = _topic_name(249 - len(_CHANGELOG_SUFFIX))
_PATH = _Kind(lambda text: Path(_text(text)).expanduser(), "a path")
_TEXT = _Kind(_text, "text that is not blank")


def _setting(default: Any, kind: _Kind, text: str, *, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"kind": kind, "help": text, "secret": secret})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting of the worker. A field `top_k` is the variable STREAM_APP_TOP_K and the option --top-k."""

    broker: str = _setting(
        "127.0.0.1:9092",
        _Kind(_kafka_servers, "HOST:PORT, several separated by commas"),
        "Kafka bootstrap servers",
    )
    model: Path | None = _setting(None, _PATH, "the bundle, a folder written by `lrurec train` or `lrurec convert`")
    app_id: str = _setting("stream-app", _APP_ID, "name of this application: consumer group and changelog prefix")
    clicks_topic: str = _setting("clicks", _TOPIC, "topic of click events")
    recommendations_topic: str = _setting("recommendations", _TOPIC, "topic of recommendations")
    dead_letter_topic: str = _setting("clicks-dead-letter", _TOPIC, "topic of messages that are no clicks")
    partitions: int = _setting(8, _integer(1, 10_000), "partitions of the clicks topic and of the changelog")
    replication_factor: int = _setting(
        0,
        _integer(0, 10),
        "copies of each partition of the topics that `stream-app topics` creates; 0: up to 3",
    )
    top_k: int = _setting(10, _integer(1, 1_000), "items in a recommendation")
    exclude_seen: bool = _setting(
        True, _Kind(_boolean, "true or false"), "leave out the user's most recent items (see recent-items)"
    )
    recent_items: int = _setting(
        100, _integer(1, 10_000), "how many of a user's latest items the state remembers, to leave them out"
    )
    publish: Literal["each", "latest"] = _setting(
        "each",
        _choice("each", "latest"),
        "a recommendation for each click, or only for a user's latest in a micro-batch",
    )
    guarantee: Literal["at_least_once", "exactly_once"] = _setting(
        "at_least_once",
        _choice("at_least_once", "exactly_once"),
        "whether recommendations may be repeated after a failure, or never for consumers that read committed ones only",
    )
    max_batch: int = _setting(4_096, _integer(1, 65_536), "clicks in a micro-batch, at most")
    max_wait_ms: int = _setting(0, _integer(0, 10_000), "milliseconds to wait for a micro-batch to fill")
    max_click_bytes: int = _setting(65_536, _integer(64, 16_777_216), "a longer click goes to the dead letters")
    device: Literal["auto", "cpu", "cuda"] = _setting("auto", _choice("auto", "cpu", "cuda"), "where the model runs")
    state_dir: Path = _setting(
        Path("stream-app-state"),
        _PATH,
        "folder of the RocksDB cache of user states; it may be lost at any time",
    )
    state_dtype: Literal["float16", "float32"] = _setting(
        "float16", _choice("float16", "float32"), "precision of the stored hidden state"
    )
    state_cache_mb: int = _setting(256, _integer(8, 1_048_576), "MiB of RocksDB block cache, shared by all partitions")
    standby_replicas: int = _setting(
        0, _integer(0, 9), "other workers that keep a copy of each partition's states, to take it over at once"
    )
    group_instance_id: str | None = _setting(
        None,
        _topic_name(100, "a name"),
        "this worker's own lasting name in its group, such as its pod's: a restart within session-timeout-seconds "
        "then moves no partitions",
    )
    session_timeout_seconds: float = _setting(
        30.0, _seconds(1, 1_800), "the group declares a silent worker dead after this long"
    )
    shutdown_seconds: float = _setting(25.0, _seconds(1, 3_600), "SIGTERM drains, commits and exits within this long")
    broker_timeout_seconds: float = _setting(30.0, _seconds(1, 600), "how long a request to Kafka may take")
    web_host: str = _setting("127.0.0.1", _TEXT, "address that the health and metrics port binds to")
    web_port: int = _setting(6066, _integer(0, 65_535), "port for /live, /ready and /metrics; 0 turns it off")
    log_format: Literal["json", "console"] = _setting(
        "json", _choice("json", "console"), "one JSON object a line, or text for people"
    )
    log_level: str = _setting(
        "info", _choice("debug", "info", "warning", "error"), "the least serious line that is logged"
    )
    security_protocol: str = _setting(
        "PLAINTEXT", _choice("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"), "how to talk to Kafka"
    )
    sasl_mechanism: str = _setting(
        "SCRAM-SHA-512", _choice("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"), "SASL mechanism"
    )
    sasl_username: str | None = _setting(None, _TEXT, "SASL user")
    sasl_password: str | None = _setting(None, _TEXT, "SASL password; never logged", secret=True)
    tls_ca_file: Path | None = _setting(None, _PATH, "PEM file of the authorities that sign Kafka's certificate")
    tls_cert_file: Path | None = _setting(None, _PATH, "PEM file of this client's certificate, for mutual TLS")
    tls_key_file: Path | None = _setting(None, _PATH, "PEM file of this client's private key")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], **options: str | None) -> Settings:
        """Settings from `STREAM_APP_*` variables, overruled by the options that are not None; both are text.

        Raises:
            SettingsError: names the variable, the value given and what is allowed.
        """
        values: dict[str, Any] = {}
        for each in fields(cls):
            name = variable(each)
            text = options.get(each.name)
            if text is None:
                text = environment.get(name)
            if text is not None:
                values[each.name] = _parse(name, text, each)
        settings = cls(**values)
        settings._check_together()
        return settings

    def _check_together(self) -> None:
        if self.security_protocol.startswith("SASL") and not (self.sasl_username and self.sasl_password):
            raise SettingsError(
                f"{PREFIX}SECURITY_PROTOCOL={self.security_protocol} needs "
                f"{PREFIX}SASL_USERNAME and {PREFIX}SASL_PASSWORD"
            )
        for prefix, protocols in (("tls_", "SSL or SASL_SSL"), ("sasl_", "SASL_PLAINTEXT or SASL_SSL")):
            given = [
                each
                for each in fields(self)
                if each.name.startswith(prefix) and getattr(self, each.name) != each.default
            ]
            if given and self.security_protocol not in protocols.split(" or "):
                raise SettingsError(
                    f"{variable(given[0])} is set, which {PREFIX}SECURITY_PROTOCOL={self.security_protocol} "
                    f"does not use: set that to {protocols}, or leave {variable(given[0])} out"
                )
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise SettingsError(f"{PREFIX}TLS_CERT_FILE and {PREFIX}TLS_KEY_FILE go together: set both or neither")
        topics = [self.clicks_topic, self.recommendations_topic, self.dead_letter_topic, self.changelog_topic]
        if len(set(topics)) < len(topics):
            raise SettingsError(
                f"{PREFIX}CLICKS_TOPIC, RECOMMENDATIONS_TOPIC and DEAD_LETTER_TOPIC must be four different topics "
                f"together with the changelog {self.changelog_topic!r}; given {', '.join(topics)}"
            )

    @property
    def changelog_topic(self) -> str:
        """The compacted topic that is the truth about every user's state."""
        return self.app_id + _CHANGELOG_SUFFIX

    def ssl_context(self) -> ssl.SSLContext | None:
        """TLS as set, None without TLS.

        Raises:
            SettingsError: a certificate or key file can't be read.
        """
        if "SSL" not in self.security_protocol:
            return None
        try:
            context = ssl.create_default_context(cafile=self.tls_ca_file)
            if self.tls_cert_file and self.tls_key_file:
                context.load_cert_chain(self.tls_cert_file, self.tls_key_file, password=_nobody_types_it)
        except OSError as error:
            files = [str(path) for path in (self.tls_ca_file, self.tls_cert_file, self.tls_key_file) if path]
            raise SettingsError(
                f"TLS files {', '.join(files)} can't be used: {error}; "
                f"{PREFIX}TLS_* name PEM files that this user can read"
            ) from None
        return context

    def kafka_client(self) -> dict[str, Any]:
        """Connection arguments that every aiokafka client of this project gets."""
        connection: dict[str, Any] = {
            "bootstrap_servers": self.broker.split(","),
            "request_timeout_ms": int(self.broker_timeout_seconds * 1000),
            "security_protocol": self.security_protocol,
            "ssl_context": self.ssl_context(),
        }
        if self.security_protocol.startswith("SASL"):
            connection |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": self.sasl_password,
            }
        return connection


def _nobody_types_it() -> str:
    """For keys with a pass phrase, which OpenSSL would ask for at the terminal."""
    raise OSError("the key has a pass phrase; give it without one, in a file that only this user can read")


def variable(setting: Field[Any]) -> str:
    """The environment variable of a field of `Settings`."""
    return PREFIX + setting.name.upper()


def misspelt(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that look like settings and are none → the setting that was probably meant.

    Only near misses: Kubernetes puts variables of its own, named after services, beside ours.
    """
    known = [variable(each) for each in fields(Settings)]
    unknown = [name for name in environment if name.startswith(PREFIX) and name not in known]
    close = {name: get_close_matches(name, known, n=1, cutoff=0.9) for name in unknown}
    return {name: matches[0] for name, matches in close.items() if matches}


def _parse(name: str, text: str, setting: Field[Any]) -> Any:
    kind: _Kind = setting.metadata["kind"]
    try:
        return kind.parse(text)
    except (ValueError, KeyError, RuntimeError):  # RuntimeError: ~name of nobody
        given = "(not shown)" if setting.metadata["secret"] else repr(text)
        raise SettingsError(f"{name}={given} is not allowed: it must be {kind.allowed}") from None
