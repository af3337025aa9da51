"""A local single-node Apache Kafka in KRaft combined mode: started, awaited and ended by the same code everywhere.

The data folder holds
    broker.lock        locked as long as a broker runs on the folder
    cluster-id         chosen once
    formatted          exists once KRaft's storage has been formatted
    kafka/             Kafka's own log directory
    server.properties  written anew at each start
    broker.log         what the JVM said since the last start; broker.log.1 the time before
    tmp/               native libraries that the JVM unpacks
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import re
import socket
import struct
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from stream_app.dev.cache import cache_folder
from stream_app.dev.deadline import Deadline
from stream_app.dev.guarded_process import GuardedProcess
from stream_app.dev.kafka.jars import ensure_jars
from stream_app.dev.kafka.java import Java, find_java
from stream_app.errors import BrokerUnavailable

DEFAULT_PORT = 9092
DEFAULT_HEAP_MB = 512
START_SECONDS = 180.0
"""A start takes some five; after `make setup`, gigabytes may still be on their way to the disk that Kafka waits for."""

STOP_SECONDS = 10.0

_HOST = "127.0.0.1"
_OWN = "PLAINTEXT"  # the listener that is always there, and its protocol
_PORT_TRIES = 5
_POLL_SECONDS = 0.05
_TROUBLE = re.compile(r"ERROR|Error|Exception")
# A killed broker's process holds the lock until the kernel has buried it.
_LOCK_SECONDS = 3.0

_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller_port}
listeners=CONTROLLER://{host}:{controller_port},{listeners}
advertised.listeners={listeners}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,{protocols}
inter.broker.listener.name=PLAINTEXT
controller.listener.names=CONTROLLER
log.dirs={log_dir}

# Topics are created by `stream-app topics`: a misspelt one must not come into being by itself.
auto.create.topics.enable=false
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1

# A group of one or two local workers: no waiting for others to join, and sessions as short as a test likes.
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=100

num.network.threads=2
num.io.threads=4
num.recovery.threads.per.data.dir=2
background.threads=2
# Kafka sets no limit: compacting a busy changelog then takes a core for seconds, which the programs beside it lack.
log.cleaner.io.max.bytes.per.second=16777216
# After a kill, the controller refuses the restarted broker until the killed one's session is over.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
"""


class LocalBroker:
    """One broker on one data folder: `with LocalBroker(folder, port=0) as broker: use(broker.bootstrap)`."""

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = DEFAULT_PORT,
        heap_mb: int = DEFAULT_HEAP_MB,
        listeners: Mapping[str, str] | None = None,
        properties: Mapping[str, str] | None = None,
        scram_users: Mapping[str, str] | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Not started yet.

        Args:
            data_dir: made for this user alone if it is not there.
            port: of the listener PLAINTEXT; 0 means a free one, chosen at start.
            heap_mb: Java heap.
            listeners: further ones, name → security protocol, each on a free port.
            properties: further lines of server.properties, or other values for its own.
            scram_users: name → password of SCRAM-SHA-256 and SCRAM-SHA-512, made when the folder is formatted.
            report: is told what a start is busy with.
        """
        self.data_dir = data_dir
        self.log_file = data_dir / "broker.log"
        self._wanted_port = port
        self._port = port
        self._heap_mb = heap_mb
        self._listeners = dict(listeners or {})
        self._ports: dict[str, int] = {}
        self._properties = dict(properties or {})
        self._scram_users = dict(scram_users or {})
        self._report = report
        self._process: GuardedProcess | None = None
        self._lock: int | None = None
        self._cluster_id = ""

    @property
    def bootstrap(self) -> str:
        """`HOST:PORT` for clients; the port is known once it has started."""
        return f"{_HOST}:{self._port}"

    def port_of(self, listener: str) -> int:
        """The port of one of the further listeners, known once it has started."""
        return self._ports[listener]

    @property
    def process(self) -> GuardedProcess | None:
        """The running JVM under its guard, None before the start and after the end."""
        return self._process

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, seconds: float = START_SECONDS) -> None:
        """Start, and return once Kafka has answered a metadata request; a first start fetches Kafka before that.

        Args:
            seconds: for the JVM to come up; fetching has a deadline of its own.

        Raises:
            BrokerUnavailable: no Java, no jars, the port or the folder is taken, or Kafka did not come up.
            SettingsError: the cache folder can't be used.
        """
        if self._process:
            raise RuntimeError(f"the broker at {self.bootstrap} runs already")
        java = find_java()
        jars = ensure_jars(cache_folder() / "jars", report=self._report)
        deadline = Deadline.after(seconds)
        try:
            self._lock = self._take_folder()
            self._cluster_id = self._known_cluster_id()
            self._start_on_a_port(java, jars, deadline)
        except BaseException as error:
            self.kill()
            if isinstance(error, OSError) and self._is_mine(error.filename):
                raise self._unusable(error) from error
            raise

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Clean stop, SIGKILL when it takes longer than `seconds`. Does nothing when it does not run."""
        if self._process:
            self._process.stop(Deadline.after(seconds))
        self.kill()

    def kill(self) -> None:
        """SIGKILL and wait: at once, for data that are thrown away or to see what a crash leaves behind."""
        if self._process:
            self._process.kill()
            self._process = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def wait(self) -> None:
        """Block as long as the broker runs.

        Raises:
            BrokerUnavailable: it ended by itself; names the last line of its log.
        """
        if self._process:
            code = self._process.wait()
            raise BrokerUnavailable(f"the local broker ended by itself (exit code {code}): {self._last_words()}")

    def _take_folder(self) -> int:
        """Lock the data folder for the broker's life. The JVM inherits the lock, so that it outlives no owner."""
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.data_dir / "broker.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unusable(error) from error
        deadline = Deadline.after(_LOCK_SECONDS)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not deadline.expired:
                    time.sleep(_POLL_SECONDS)
                    continue
                os.close(lock)
                raise BrokerUnavailable(
                    f"the data folder {self.data_dir} belongs to another running broker;"
                    " stop that one or name another folder with --data-dir"
                ) from None
            return lock

    def _is_mine(self, file: object) -> bool:
        return file is not None and Path(str(file)).is_relative_to(self.data_dir)

    def _unusable(self, error: OSError) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"the local broker cannot use the data folder {self.data_dir}: {error.strerror}: {error.filename};"
            " name another with --data-dir"
        )

    def _known_cluster_id(self) -> str:
        """Kafka's id of this cluster: 16 random bytes in URL-safe base64, the same for the life of the folder."""
        file = self.data_dir / "cluster-id"
        with contextlib.suppress(FileNotFoundError):
            return file.read_text("ascii").strip()
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "_")
        _write_whole(file, cluster_id)
        return cluster_id

    def _start_on_a_port(self, java: Java, jars: list[Path], deadline: Deadline) -> None:
        for attempt in range(1, _PORT_TRIES + 1):
            self._port = self._wanted_port or _free_port()
            if self._wanted_port:
                _refuse_taken_port(self._wanted_port)
            try:
                self._launch(java, jars, deadline)
                return
            except PortTaken:
                # A free port was free when it was chosen; somebody else may have been quicker.
                if attempt == _PORT_TRIES:
                    raise
                if self._process:
                    self._process.kill()

    def _launch(self, java: Java, jars: list[Path], deadline: Deadline) -> None:
        properties = self._write_properties()
        self._format_once(java, jars, properties, deadline)
        self._report(f"starting Apache Kafka on {self.bootstrap} (Java {java.version}: {java.executable})")
        with contextlib.suppress(FileNotFoundError):
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        self._process = self._run_java(java, jars, "kafka.Kafka", properties)
        self._await_readiness(self._process, deadline)

    def _write_properties(self) -> Path:
        file = self.data_dir / "server.properties"
        (self.data_dir / "kafka").mkdir(exist_ok=True, mode=0o700)  # clicks and states will be in there
        self._ports = {name: _free_port() for name in self._listeners}
        own = _PROPERTIES.format(
            host=_HOST,
            controller_port=_free_port(),
            listeners=",".join(f"{name}://{_HOST}:{port}" for name, port in {_OWN: self._port, **self._ports}.items()),
            protocols=",".join(f"{name}:{kind}" for name, kind in {_OWN: _OWN, **self._listeners}.items()),
            log_dir=_escaped(str((self.data_dir / "kafka").absolute())),
        )
        # Of two lines with one name Java takes the last.
        _write_whole(file, own + "".join(f"{name}={_escaped(value)}\n" for name, value in self._properties.items()))
        return file

    def _format_once(self, java: Java, jars: list[Path], properties: Path, deadline: Deadline) -> None:
        """Format KRaft's storage. The mark comes last: a format that was killed half-way is done again."""
        mark = self.data_dir / "formatted"
        if mark.exists():
            return
        self._report(f"formatting {self.data_dir}")
        users = [
            f"--add-scram={mechanism}=[name={name},password={password}]"
            for name, password in self._scram_users.items()
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
        ]
        self._process = self._run_java(
            java, jars, "kafka.tools.StorageTool", "format", "--ignore-formatted",
            "--cluster-id", self._cluster_id, "--config", properties, *users,
        )  # fmt: skip
        try:
            code = self._process.wait(deadline.remaining)
        except subprocess.TimeoutExpired:
            raise BrokerUnavailable(f"formatting the local broker's storage took too long; {self._see_log()}") from None
        if code != 0:
            raise BrokerUnavailable(f"formatting the local broker's storage failed: {self._last_words()}")
        mark.touch()

    def _run_java(self, java: Java, jars: list[Path], main_class: str, *arguments: str | Path) -> GuardedProcess:
        scratch = self.data_dir / "tmp"
        scratch.mkdir(exist_ok=True)
        command = [
            java.executable,
            f"-Xmx{self._heap_mb}m",
            "-XX:+ExitOnOutOfMemoryError",
            # Record batches are humongous objects to G1 in a heap this small: it marks without end, half of all the CPU
            # time that the broker takes under load, which the programs beside it lack.
            "-XX:+UseSerialGC",
            "-XX:-UsePerfData",  # no file in the system's temporary folder for each JVM
            f"-Djava.io.tmpdir={scratch}",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSXXX",
            "-Dlog4j2.StatusLogger.level=OFF",  # log4j is in the class path, but the log is slf4j-simple's
            main_class,
            *arguments,
        ]
        # In the environment, not the command line: a process list stays readable with 46 jars.
        environ = {**os.environ, "CLASSPATH": os.pathsep.join(map(str, jars))}
        with self.log_file.open("ab") as log:
            keep = () if self._lock is None else (self._lock,)
            return GuardedProcess(command, output=log, environ=environ, keep_open=keep)

    def _await_readiness(self, process: GuardedProcess, deadline: Deadline) -> None:
        while not _serves_cluster(self._port, self._cluster_id):
            if process.exit_code() is not None:
                if "Address already in use" in self._log():
                    raise PortTaken(self._port)
                raise BrokerUnavailable(f"the local broker did not start: {self._last_words()}")
            if deadline.expired:
                raise BrokerUnavailable(f"the local broker was not ready in time: {self._last_words()}")
            time.sleep(_POLL_SECONDS)

    def _last_words(self) -> str:
        """The log's last line that tells of trouble and the one after it, else its last line; and where the log is."""
        lines = [line.strip() for line in self._log().splitlines() if line.strip() and not line.startswith("\tat ")]
        trouble = [number for number, line in enumerate(lines) if _TROUBLE.search(line)]
        words = lines[trouble[-1] :][:2] if trouble else lines[-1:]
        return f"{': '.join(words)[:300] or 'it said nothing'}; {self._see_log()}"

    def _log(self) -> str:
        try:
            return self.log_file.read_text("utf-8", "replace")
        except OSError:
            return ""

    def _see_log(self) -> str:
        return f"see {self.log_file}"


class PortTaken(BrokerUnavailable):
    """Somebody else listens on the port asked for."""

    def __init__(self, port: int) -> None:
        super().__init__(f"port {port} on {_HOST} is taken; name another with --port, or --port 0 for a free one")


def _escaped(value: str) -> str:
    """A value of a Java properties file, where a backslash begins an escape."""
    return value.replace("\\", "\\\\")


def _write_whole(file: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    draft = file.with_name(f".{file.name}.new")
    draft.write_text(text, "utf-8")
    draft.replace(file)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _refuse_taken_port(port: int) -> None:
    with socket.socket() as probe:
        # As Kafka binds: connections of an earlier broker in TIME_WAIT are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except PermissionError:
            raise BrokerUnavailable(
                f"port {port} needs privileges that this user lacks; name one above 1023 with --port"
            ) from None
        except OSError:
            raise PortTaken(port) from None


def _serves_cluster(port: int, cluster_id: str) -> bool:
    """Whether the broker at `port` answers a metadata request, is in service, and is the one of that cluster."""
    try:
        with socket.create_connection((_HOST, port), timeout=1) as connection:
            connection.sendall(_METADATA_REQUEST)
            (size,) = struct.unpack(">i", _read_exactly(connection, 4))
            return _alive_in_cluster(_read_exactly(connection, size), cluster_id)
    except (OSError, struct.error):
        return False


# Metadata, version 2 (api key 3): correlation id 1, client id "ready", no topics. A length comes before it all.
_METADATA_REQUEST = struct.pack(">ihhih5si", 19, 3, 2, 1, 5, b"ready", 0)


def _alive_in_cluster(answer: bytes, cluster_id: str) -> bool:
    """Read `correlation_id, [node_id, host, port, rack], cluster_id, …`. A fenced broker is not in the list."""
    _, brokers = struct.unpack_from(">ii", answer)
    at = 8
    for _ in range(brokers):
        (host_length,) = struct.unpack_from(">h", answer, at + 4)
        at += 4 + 2 + host_length + 4
        (rack_length,) = struct.unpack_from(">h", answer, at)
        at += 2 + max(rack_length, 0)
    (length,) = struct.unpack_from(">h", answer, at)
    return brokers > 0 and answer[at + 2 : at + 2 + max(length, 0)] == cluster_id.encode()


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        chunk = connection.recv(size - len(received))
        if not chunk:
            raise ConnectionError("closed in mid-answer")
        received += chunk
    return received
