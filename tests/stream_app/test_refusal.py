"""Who may come in gets through with every client; who may not learns why, in one line that names what to check."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lrurec.bundle import save_bundle
from lrurec.convert import convert
from stream_app.cli import main
from stream_app.errors import AccessRefused, BrokerUnavailable
from stream_app.refusal import find_refusal
from stream_app.settings import Settings
from stream_app.topics import ensure_topics
from stream_app.verify.verify import verify
from tests.stream_app.live import Site, WorkerProcess, recommendations_for, run_command
from tests.stream_app.secured import MECHANISMS, PLAIN_PASSWORD, SCRAM_PASSWORD, SecuredKafka

# aiokafka closes a connection that was refused at the next turn of the event loop, which a command may not live to see.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect_refused_connections() -> Iterator[None]:
    """While this module's filter holds, not in somebody else's test."""
    yield
    gc.collect()


GOLDEN = Path(__file__).parents[1] / "lrurec" / "golden" / "public_large_d64_b2.npz"

#: A door → the settings that open it.
DOORS: dict[str, Callable[[SecuredKafka], dict[str, str]]] = {
    "TLS": lambda kafka: kafka.tls("TLS"),
    "mutual TLS": lambda kafka: kafka.tls("MUTUAL", client="client"),
    **{f"{each} over TLS": lambda kafka, each=each: kafka.sasl("SASL_TLS", each) for each in MECHANISMS},
    **{each: lambda kafka, each=each: kafka.sasl("SASL_OPEN", each) for each in MECHANISMS},
}

WRONG_CREDENTIAL = (
    r"does not let user '{user}' in \(.+\); check STREAM_APP_SASL_USERNAME, STREAM_APP_SASL_PASSWORD and "
    r"STREAM_APP_SASL_MECHANISM={mechanism}"
)
BROKE_OFF = r"broke the connection off, .*check STREAM_APP_SECURITY_PROTOCOL={} and the port in STREAM_APP_BROKER"

#: A mistake → the settings that make it, and the line that names it.
MISTAKES: dict[str, tuple[Callable[[SecuredKafka], dict[str, str]], str]] = {
    **{
        f"wrong password, {each}": (
            lambda kafka, each=each: kafka.sasl("SASL_TLS", each, password="wr0ng-one"),  # noqa: S106
            WRONG_CREDENTIAL.format(user="shop", mechanism=each),
        )
        for each in MECHANISMS
    },
    **{
        f"unknown user, {each}": (
            lambda kafka, each=each: {**kafka.sasl("SASL_OPEN", each), "SASL_USERNAME": "nobody"},
            WRONG_CREDENTIAL.format(user="nobody", mechanism=each),
        )
        for each in MECHANISMS
    },
    "mechanism that is not enabled": (
        lambda kafka: kafka.sasl("SCRAM_ONLY", "PLAIN"),
        r"does not take STREAM_APP_SASL_MECHANISM=PLAIN; choose one",
    ),
    "wrong authority": (
        lambda kafka: kafka.tls("TLS", ca="foreign-ca"),
        r"no authority in STREAM_APP_TLS_CA_FILE=.*foreign-ca\.pem has signed",
    ),
    "no authority": (
        lambda kafka: {"BROKER": kafka.address("TLS"), "SECURITY_PROTOCOL": "SSL"},
        r"no authority of this system has signed .*name by STREAM_APP_TLS_CA_FILE",
    ),
    "no client certificate": (
        lambda kafka: kafka.tls("MUTUAL"),
        r"STREAM_APP_TLS_CERT_FILE",
    ),
    "client certificate of another authority": (
        lambda kafka: kafka.tls("MUTUAL", client="foreign-client"),
        r"refuses the certificate in STREAM_APP_TLS_CERT_FILE=.*foreign-client\.pem|broke the connection off",
    ),
    "name that is not in the certificate": (
        lambda kafka: {**kafka.tls("TLS"), "BROKER": kafka.address("TLS", "localhost")},
        r"at localhost:\d+ shows a certificate for another name .*'localhost'.*STREAM_APP_BROKER",
    ),
    "advertised name that is not in the certificate": (
        lambda kafka: {**kafka.tls("LOCALHOST"), "BROKER": kafka.address("LOCALHOST", "localhost")},
        r"at 127\.0\.0\.1:\d+ shows a certificate for another name .*'127\.0\.0\.1'.*advertised\.listeners",
    ),
    "expired certificate": (
        lambda kafka: kafka.tls("EXPIRED"),
        r"shows a certificate out of its time \(certificate has expired\); give Kafka a new one",
    ),
    "plaintext at TLS": (lambda kafka: {"BROKER": kafka.address("TLS")}, BROKE_OFF.format("PLAINTEXT")),
    "plaintext at SASL": (lambda kafka: {"BROKER": kafka.address("SASL_OPEN")}, BROKE_OFF.format("PLAINTEXT")),
    "TLS at plaintext": (lambda kafka: kafka.tls("PLAINTEXT"), BROKE_OFF.format("SSL")),
    "TLS alone at SASL over TLS": (lambda kafka: kafka.tls("SASL_TLS"), BROKE_OFF.format("SSL")),
    "SASL at plaintext": (
        lambda kafka: kafka.sasl("PLAINTEXT", "PLAIN"),
        r"wants no SASL at this port; check STREAM_APP_SECURITY_PROTOCOL=SASL_PLAINTEXT and the port",
    ),
}

DEADLINE_SECONDS = 30


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bundle"
    save_bundle(folder, convert(GOLDEN))
    return folder


@pytest.fixture
def make_site(
    secured: SecuredKafka, unique_name: Callable[[str], str], bundle_folder: Path, tmp_path: Path
) -> Callable[..., Site]:
    """A site whose commands and worker have these settings; the tests' own clients come by the plain door."""

    def make(settings: dict[str, str]) -> Site:
        limits = {"BROKER_TIMEOUT_SECONDS": str(DEADLINE_SECONDS), "LOG_LEVEL": "debug"}
        return Site(
            secured.broker.bootstrap, unique_name("app"), bundle_folder, tmp_path, partitions=2, extra=limits | settings
        )

    return make


@pytest.fixture
def log(tmp_path: Path) -> Path:
    file = tmp_path / "clicks.csv"
    file.write_text("user_id,item_id,position\n" + "".join(f"u{n % 3},{n + 1},{n}\n" for n in range(12)))
    return file


def settings_of(options: dict[str, str]) -> Settings:
    return Settings.from_environment({}, **{name.lower(): value for name, value in options.items()})


async def run(*command: str, environment: dict[str, str]) -> Result:
    """A command in this process; in a thread, because it has an event loop of its own."""
    return await asyncio.to_thread(CliRunner().invoke, main, command, env=environment)


def assert_no_secret(text: str) -> None:
    assert not re.search(rf"{PLAIN_PASSWORD}|{re.escape(SCRAM_PASSWORD)}|wr0ng-one", text)
    assert "c=biws" not in text  # the answer that proves a password, which guesses could be tried on


@pytest.mark.parametrize("door", DOORS)
async def test_nothing_is_found_where_nothing_is_wrong(secured: SecuredKafka, door: str) -> None:
    assert await find_refusal(settings_of(DOORS[door](secured))) is None


#: Every protocol and every mechanism: a worker takes its time to start.
@pytest.mark.parametrize("door", ["mutual TLS", "PLAIN over TLS", "SCRAM-SHA-256", "SCRAM-SHA-512 over TLS"])
async def test_every_client_gets_through_and_the_worker_tells_no_password(
    secured: SecuredKafka, make_site: Callable[..., Site], log: Path, door: str
) -> None:
    site = make_site(DOORS[door](secured))
    for command in (["topics"], ["replay", str(log)]):
        result = await run(*command, environment=site.environment())
        assert result.exit_code == 0, result.stderr
    with WorkerProcess(site) as worker:
        await recommendations_for(site, clicks=12)
        metrics = await asyncio.to_thread(worker.metrics)
        assert worker.terminate() == 0, worker.tail()
    report = await verify(Settings.from_environment(site.environment()))
    assert (report.clean, report.clicks) == (True, 12)
    logged = worker.log.read_text()
    assert ("SaslAuthenticateRequest" in logged) == ("SASL_USERNAME" in site.extra)  # level debug tells of requests
    assert_no_secret(logged + metrics)


def test_no_command_tells_the_password(secured: SecuredKafka, make_site: Callable[..., Site], log: Path) -> None:
    environment = make_site(DOORS["PLAIN"](secured)).environment()
    for command in (["topics"], ["replay", str(log)], ["verify"]):
        result = run_command(command, environment)
        assert "Error" not in result.stderr
        assert_no_secret(result.stdout + result.stderr)


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_mistake_is_one_line_that_names_what_to_check(
    secured: SecuredKafka, make_site: Callable[..., Site], log: Path, mistake: str
) -> None:
    settings, pattern = MISTAKES[mistake]
    environment = make_site(settings(secured)).environment()
    for command in (["topics"], ["replay", str(log)]):
        began = time.monotonic()
        result = await run(*command, environment=environment)
        assert time.monotonic() - began < DEADLINE_SECONDS
        assert result.exit_code == 1
        assert result.stdout == ""
        [line] = result.stderr.splitlines()
        assert line.startswith("Error: Kafka at ")
        assert re.search(pattern, line), line
        assert_no_secret(line)
    with pytest.raises(BrokerUnavailable, match=pattern):
        await verify(Settings.from_environment(environment))


@pytest.mark.parametrize("mistake", ["wrong password, PLAIN", "wrong authority"])
def test_a_worker_that_is_not_let_in_ends_with_the_same_line(
    secured: SecuredKafka, make_site: Callable[..., Site], mistake: str
) -> None:
    settings, pattern = MISTAKES[mistake]
    with WorkerProcess(make_site(settings(secured))) as worker:
        assert worker.process.wait(30) == 1
    *lines, error = worker.log.read_text().splitlines()
    assert error.startswith("Error: Kafka at ")
    assert re.search(pattern, error), error
    assert all(line.startswith("{") for line in lines)
    assert_no_secret("".join(lines))


async def test_a_silent_port_is_told_from_a_refusal(secured: SecuredKafka, silent_port: int) -> None:
    settings = {**secured.tls("TLS"), "BROKER": f"127.0.0.1:{silent_port}", "BROKER_TIMEOUT_SECONDS": "1"}
    with pytest.raises(BrokerUnavailable, match=r"did not answer within 1 s") as error:
        await ensure_topics(settings_of(settings))
    assert not isinstance(error.value, AccessRefused)
