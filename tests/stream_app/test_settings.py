"""Every setting can be set, every mistake is named, no secret shows."""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_app.errors import SettingsError, StreamAppError
from stream_app.settings import Settings, misspelt, variable

SECRET = "tr0ub4dor&3"  # noqa: S105

#: field → (text, value, texts that are refused, a part of what is allowed)
CASES = {
    "broker": (
        "a:9092, [::1]:1",
        "a:9092,[::1]:1",
        ["", "a", "a:", ":1", "a:0", "a:65536", "a:1,", "k://a:1"],
        "HOST:PORT",
    ),
    "model": ("/m", Path("/m"), ["", "  ", "~nobody-has-this-name/m"], "a path"),
    "app_id": ("shop-2", "shop-2", ["", "a b", "ä", "x" * 229, "."], "1 to 228 letters, digits"),
    "clicks_topic": ("c.1", "c.1", ["", "a/b", "x" * 250, ".."], "a Kafka topic name: 1 to 249"),
    "recommendations_topic": ("r_1", "r_1", ["", "a b"], "a Kafka topic name"),
    "dead_letter_topic": ("d-1", "d-1", ["", "a,b"], "a Kafka topic name"),
    "partitions": ("64", 64, ["0", "10001", "8.0", "many", ""], "a whole number from 1 to 10,000"),
    "replication_factor": ("3", 3, ["-1", "11"], "a whole number from 0 to 10"),
    "top_k": ("20", 20, ["0", "1001", "ten"], "a whole number from 1 to 1,000"),
    "exclude_seen": ("False", False, ["maybe", "", "2"], "true or false"),
    "recent_items": ("50", 50, ["0", "10001"], "a whole number from 1 to 10,000"),
    "publish": ("Latest", "latest", ["all", ""], "one of each, latest"),
    "guarantee": ("Exactly_Once", "exactly_once", ["exactly-once", ""], "one of at_least_once, exactly_once"),
    "max_batch": ("512", 512, ["0", "65537"], "a whole number from 1 to 65,536"),
    "max_wait_ms": ("5", 5, ["-1", "10001", "0.5"], "a whole number from 0 to 10,000"),
    "max_click_bytes": ("1024", 1024, ["63", "16777217"], "a whole number from 64 to 16,777,216"),
    "device": ("cpu", "cpu", ["gpu"], "one of auto, cpu, cuda"),
    "state_dir": ("state", Path("state"), [""], "a path"),
    "state_dtype": ("float32", "float32", ["bfloat16"], "one of float16, float32"),
    "state_cache_mb": ("64", 64, ["7", "1048577"], "a whole number from 8 to 1,048,576"),
    "standby_replicas": ("1", 1, ["-1", "10", "one"], "a whole number from 0 to 9"),
    "group_instance_id": ("pod-0", "pod-0", ["", "a b", "x" * 101, ".."], "a name: 1 to 100 letters"),
    "session_timeout_seconds": ("10.5", 10.5, ["0.5", "1801", "nan", "inf", "soon"], "seconds from 1 to 1800"),
    "shutdown_seconds": ("60", 60.0, ["0", "3601"], "seconds from 1 to 3600"),
    "broker_timeout_seconds": ("5", 5.0, ["0", "601"], "seconds from 1 to 600"),
    "web_host": ("0.0.0.0", "0.0.0.0", ["", " "], "text that is not blank"),  # noqa: S104
    "web_port": ("0", 0, ["-1", "65536"], "a whole number from 0 to 65,535"),
    "log_format": ("console", "console", ["xml"], "one of json, console"),
    "log_level": ("DEBUG", "debug", ["loud"], "one of debug, info, warning, error"),
    "security_protocol": ("ssl", "SSL", ["TLS"], "one of PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL"),
    "sasl_mechanism": ("plain", "PLAIN", ["GSSAPI"], "one of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512"),
    "sasl_username": ("me", "me", ["", " "], "text that is not blank"),
    "sasl_password": (SECRET, SECRET, [], "text that is not blank"),
    "tls_ca_file": ("/ca", Path("/ca"), [""], "a path"),
    "tls_cert_file": ("/cert", Path("/cert"), [""], "a path"),
    "tls_key_file": ("/key", Path("/key"), [""], "a path"),
}
#: What has to be set beside a field.
TLS = {"STREAM_APP_SECURITY_PROTOCOL": "SSL"}
SASL = {
    "STREAM_APP_SECURITY_PROTOCOL": "SASL_SSL",
    "STREAM_APP_SASL_USERNAME": "u",
    "STREAM_APP_SASL_PASSWORD": "p",
}
COMPANY = {
    "tls_ca_file": TLS,
    "tls_cert_file": {"STREAM_APP_TLS_KEY_FILE": "/k", **TLS},
    "tls_key_file": {"STREAM_APP_TLS_CERT_FILE": "/c", **TLS},
    "sasl_mechanism": SASL,
    "sasl_username": SASL,
    "sasl_password": SASL,
}


def test_every_field_has_a_case_here():
    assert CASES.keys() == {field.name for field in fields(Settings)}


@pytest.mark.parametrize("field", fields(Settings), ids=lambda field: field.name)
def test_every_field_is_reached_by_its_variable_and_by_its_option(field):
    text, value, *_ = CASES[field.name]
    company = COMPANY.get(field.name, {})
    by_variable = Settings.from_environment(company | {f"STREAM_APP_{field.name.upper()}": text})
    by_option = Settings.from_environment(company, **{field.name: text})
    assert getattr(by_variable, field.name) == getattr(by_option, field.name) == value
    assert field.default != value
    assert getattr(Settings.from_environment({}), field.name) == field.default
    assert field.metadata["help"]


def test_an_option_overrules_its_variable_and_an_absent_one_does_not():
    environment = {"STREAM_APP_TOP_K": "20"}
    assert Settings.from_environment(environment, top_k="30").top_k == 30
    assert Settings.from_environment(environment, top_k=None).top_k == 20


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, (_, _, refused, _) in CASES.items() for text in refused]
)
def test_an_error_names_the_variable_the_value_and_what_is_allowed(name, text):
    with pytest.raises(SettingsError) as error:
        Settings.from_environment({f"STREAM_APP_{name.upper()}": text})
    assert f"STREAM_APP_{name.upper()}={text!r} is not allowed" in str(error.value)
    assert CASES[name][3] in str(error.value)
    assert isinstance(error.value, StreamAppError)
    assert error.value.__cause__ is None


@given(
    st.sampled_from(fields(Settings)), st.text(max_size=20) | st.sampled_from(["~", "~x", "1e9", "٣", "0x10", "nan"])
)
@settings(max_examples=400)
def test_no_text_whatever_raises_anything_else(field, text):
    with suppress(SettingsError):
        assert isinstance(Settings.from_environment({variable(field): text}), Settings)


def test_settings_never_change():
    with pytest.raises(FrozenInstanceError):
        Settings().top_k = 3


def test_variables_of_others_are_left_alone():
    assert Settings.from_environment({"STREAM_APP_PORT_6066_TCP": "x", "TOP_K": "99"}) == Settings()


def test_only_near_misses_are_taken_for_misspelt_settings():
    environment = {"STREAM_APP_TOPK": "1", "STREAM_APP_SERVICE_HOST": "x", "STREAM_APP_TOP_K": "1", "TOPK": "1"}
    assert misspelt(environment) == {"STREAM_APP_TOPK": "STREAM_APP_TOP_K"}


# -- settings that belong together


@pytest.mark.parametrize(
    "same",
    [
        {"recommendations_topic": "clicks"},
        {"dead_letter_topic": "clicks"},
        {"dead_letter_topic": "recommendations"},
        {"clicks_topic": "stream-app-user_state-changelog"},
        {"app_id": "a", "recommendations_topic": "a-user_state-changelog"},
    ],
)
def test_two_roles_for_one_topic_are_refused(same):
    with pytest.raises(SettingsError, match=r"CLICKS_TOPIC.*four different topics .* changelog .*; given"):
        Settings.from_environment({}, **same)


def test_the_longest_app_id_has_a_changelog_that_kafka_takes():
    assert len(Settings.from_environment({}, app_id="x" * 228).changelog_topic) == 249


# -- TLS and SASL


def test_without_tls_there_is_no_context_and_no_credential():
    connection = Settings(broker="a:1,b:2", broker_timeout_seconds=5).kafka_client()
    assert connection == {
        "bootstrap_servers": ["a:1", "b:2"],
        "request_timeout_ms": 5000,
        "security_protocol": "PLAINTEXT",
        "ssl_context": None,
    }


@pytest.mark.parametrize("protocol", ["SSL", "SASL_SSL"])
def test_tls_verifies_the_broker_and_its_name(protocol):
    context = Settings(security_protocol=protocol).ssl_context()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("protocol", ["SASL_PLAINTEXT", "SASL_SSL"])
def test_sasl_hands_its_credentials_to_the_client(protocol, mechanism):
    found = Settings.from_environment(
        {}, security_protocol=protocol, sasl_mechanism=mechanism, sasl_username="me", sasl_password=SECRET
    )
    connection = found.kafka_client()
    assert connection["security_protocol"] == protocol
    assert connection["sasl_mechanism"] == mechanism
    assert (connection["sasl_plain_username"], connection["sasl_plain_password"]) == ("me", SECRET)
    assert (connection["ssl_context"] is None) == (protocol == "SASL_PLAINTEXT")


@pytest.mark.parametrize("given_", [{}, {"sasl_username": "me"}, {"sasl_password": SECRET}])
@pytest.mark.parametrize("protocol", ["SASL_PLAINTEXT", "SASL_SSL"])
def test_sasl_without_both_credentials_is_refused(protocol, given_):
    with pytest.raises(SettingsError, match=f"{protocol} needs .*SASL_USERNAME and .*SASL_PASSWORD") as error:
        Settings.from_environment({}, security_protocol=protocol, **given_)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("half", [{"tls_cert_file": "/c"}, {"tls_key_file": "/k"}])
def test_a_certificate_without_its_key_is_refused(half):
    with pytest.raises(SettingsError, match=r"TLS_CERT_FILE and .*TLS_KEY_FILE go together"):
        Settings.from_environment({}, security_protocol="SSL", **half)


@pytest.mark.parametrize("content", [None, "no PEM"])
def test_a_certificate_file_that_cannot_be_used_is_named(tmp_path, content):
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=r"TLS files .*ca\.pem can't be used: .*STREAM_APP_TLS_\*"):
        Settings(security_protocol="SSL", tls_ca_file=file).ssl_context()


@pytest.fixture
def certificate(tmp_path):
    """Files of an authority, of a certificate that it signed, and of its key."""
    authority = trustme.CA()
    leaf = authority.issue_cert("client.example")
    files = {"ca": authority.cert_pem, "cert": leaf.cert_chain_pems[0], "key": leaf.private_key_pem}
    for name, content in files.items():
        content.write_to_path(tmp_path / f"{name}.pem")
    return {f"tls_{name}_file": tmp_path / f"{name}.pem" for name in files}


def test_mutual_tls_trusts_the_given_authority_alone(certificate):
    assert len(Settings(security_protocol="SSL", **certificate).ssl_context().get_ca_certs()) == 1


def test_another_certificates_key_is_refused(certificate):
    trustme.CA().issue_cert("other.example").private_key_pem.write_to_path(certificate["tls_key_file"])
    with pytest.raises(SettingsError, match=r"key values mismatch"):
        Settings(security_protocol="SSL", **certificate).ssl_context()


def test_a_key_with_a_pass_phrase_is_refused_and_nobody_is_asked_for_it(certificate):
    key = load_pem_private_key(certificate["tls_key_file"].read_bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"phrase"))
    certificate["tls_key_file"].write_bytes(locked)
    with pytest.raises(SettingsError, match=r"key\.pem can't be used: the key has a pass phrase; give it without one"):
        Settings(security_protocol="SSL", **certificate).ssl_context()


@pytest.mark.parametrize(
    ("given_", "named", "wanted"),
    [
        ({"tls_ca_file": "/ca"}, "TLS_CA_FILE", "SSL or SASL_SSL"),
        ({"tls_ca_file": "/ca", "security_protocol": "SASL_PLAINTEXT"}, "TLS_CA_FILE", "SSL or SASL_SSL"),
        ({}, "SASL_USERNAME", "SASL_PLAINTEXT or SASL_SSL"),
        ({"security_protocol": "SSL"}, "SASL_USERNAME", "SASL_PLAINTEXT or SASL_SSL"),
    ],
)
def test_a_setting_that_the_protocol_does_not_use_is_refused(given_, named, wanted):
    """Else whoever forgets the protocol believes that the connection is safe."""
    with pytest.raises(SettingsError, match=f"{named} is set, .* does not use: set that to {wanted}, or") as error:
        Settings.from_environment({}, sasl_username="me", sasl_password=SECRET, **given_)
    assert SECRET not in str(error.value)


# -- secrets


def test_the_password_shows_in_no_text():
    found = Settings.from_environment(SASL | {"STREAM_APP_SASL_PASSWORD": SECRET})
    assert found.sasl_password == SECRET
    assert SECRET not in repr(found)
    assert SECRET not in str(found)
    assert "sasl_password" not in repr(found)


@pytest.mark.parametrize("text", ["", "   "])
def test_a_password_that_is_refused_is_not_shown(text):
    with pytest.raises(SettingsError, match=r"STREAM_APP_SASL_PASSWORD=\(not shown\) is not allowed"):
        Settings.from_environment({"STREAM_APP_SASL_PASSWORD": text})


def test_another_settings_error_does_not_show_the_password():
    with pytest.raises(SettingsError) as error:
        Settings.from_environment({"STREAM_APP_SASL_PASSWORD": SECRET, "STREAM_APP_TOP_K": "0"})
    assert SECRET not in str(error.value)


def test_every_field_that_sounds_secret_is_kept_out_of_the_repr():
    for field in fields(Settings):
        assert field.repr == (not any(word in field.name for word in ("password", "secret", "token")))
