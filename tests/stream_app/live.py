"""What the live tests share: a worker in a process of its own, foreign Kafka clients, and an oracle without our code.

The clients are plain aiokafka. The oracle computes lists with the published model's parallel form over a user's whole
history, and knows nothing of states, batches or offsets.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from aiokafka.structs import ConsumerRecord

from lrurec.bundle import Bundle

SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True)
class Site:
    """Names and places of one test: its topics, its consumer group, its bundle and its folder."""

    bootstrap: str
    name: str
    bundle: Path
    folder: Path
    partitions: int = 4
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def clicks(self) -> str:
        return f"{self.name}-clicks"

    @property
    def recommendations(self) -> str:
        return f"{self.name}-recommendations"

    @property
    def dead_letters(self) -> str:
        return f"{self.name}-dead-letters"

    @property
    def changelog(self) -> str:
        return f"{self.name}-user_state-changelog"

    def environment(self, **extra: str) -> dict[str, str]:
        """The variables of a worker; a clean environment otherwise."""
        settings = {
            "BROKER": self.bootstrap,
            "MODEL": str(self.bundle),
            "APP_ID": self.name,
            "CLICKS_TOPIC": self.clicks,
            "RECOMMENDATIONS_TOPIC": self.recommendations,
            "DEAD_LETTER_TOPIC": self.dead_letters,
            "PARTITIONS": str(self.partitions),
            "STATE_DIR": str(self.folder / "state"),
            "STATE_DTYPE": "float32",
            "SESSION_TIMEOUT_SECONDS": "3",
            "SHUTDOWN_SECONDS": "15",
            **self.extra,
            **extra,
        }
        clean = {key: value for key, value in os.environ.items() if not key.startswith("STREAM_APP_")}
        return clean | {f"STREAM_APP_{name}": value for name, value in settings.items()}

    def create_topics(self) -> None:
        """Create the four topics by the project's own command."""
        result = run_command(["topics"], self.environment())
        assert result.returncode == 0, result.stderr


def run_command(arguments: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `stream-app` to its end."""
    return subprocess.run(
        [SCRIPTS / "stream-app", *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


class WorkerProcess:
    """`stream-app worker`, ended by its own process id."""

    def __init__(self, site: Site, name: str = "worker", **settings: str) -> None:
        self.port = free_port()
        self.log = site.folder / f"{name}.log"
        self._begin = self.log.stat().st_size if self.log.exists() else 0
        environment = site.environment(WEB_PORT=str(self.port), **settings)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [SCRIPTS / "stream-app", "worker"], env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()

    def wait_ready(self, seconds: float = 40) -> Self:
        """Until /ready says so."""
        wait_until(lambda: self.ask("/ready") == 200 or self.process.poll() is not None, seconds, self.tail)
        assert self.process.poll() is None, self.tail()
        return self

    def ask(self, path: str) -> int:
        """HTTP status of the health port; 0 while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0

    def metric(self, name: str) -> float:
        """A metric without labels."""
        lines = self.metrics().splitlines()
        return float(next(line.split()[1] for line in lines if line.split()[0] == f"stream_app_{name}"))

    def metrics(self) -> str:
        """All of them, as Prometheus reads them."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    def lag(self) -> float | None:
        """Clicks behind, over all partitions; None while no partition's is known."""
        lines = self.metrics().splitlines()
        found = [float(line.split()[1]) for line in lines if line.startswith("stream_app_lag_clicks{")]
        return sum(found) if found else None

    def standby_lag(self) -> dict[int, float]:
        """Partition that it follows for another worker → records behind."""
        found = re.findall(r'^stream_app_standby_lag_records\{partition="(\d+)"\} (\S+)$', self.metrics(), re.MULTILINE)
        return {int(partition): float(records) for partition, records in found}

    def holds(self) -> list[int] | None:
        """The partitions that its last line about being ready names; None before the first."""
        ready = self.events("ready")
        return ready[-1]["partitions"] if ready else None

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of its log with this name since it was started."""
        with self.log.open("rb") as log:
            log.seek(self._begin)
            lines = [json.loads(line) for line in log.read().splitlines() if line.startswith(b"{")]
        return [line for line in lines if line["event"] == name]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def terminate(self, seconds: float = 20) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def tail(self) -> str:
        return self.log.read_text()[-4000:]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float, explain: Callable[[], str] = str) -> None:
    """Poll until the condition holds; fail with an explanation at the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {explain()}"
        time.sleep(0.02)


# -- foreign clients


@asynccontextmanager
async def producer(site: Site, compression: str | None = None) -> AsyncIterator[AIOKafkaProducer]:
    client = AIOKafkaProducer(bootstrap_servers=site.bootstrap, acks="all", linger_ms=2, compression_type=compression)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def click(user_id: str, item_id: str, timestamp_ms: int = 1_700_000_000_000, **more: Any) -> tuple[bytes, bytes]:
    """Key and value of a click, as another team would write them."""
    event = {"user_id": user_id, "item_id": item_id, "timestamp_ms": timestamp_ms, **more}
    return user_id.encode(), json.dumps(event).encode()


async def produce(
    site: Site, records: Iterable[tuple[bytes | None, bytes | None]], compression: str | None = None
) -> None:
    """Write records to the clicks topic, keyed by the default partitioner."""
    async with producer(site, compression) as client:
        sent = [await client.send(site.clicks, key=key, value=value) for key, value in records]
        await asyncio.gather(*sent)


class _RawName(str):
    """A header name that is written as other bytes than UTF-8 has for it."""

    raw: bytes

    def encode(self, *_: object) -> bytes:
        return self.raw


def header_name(raw: bytes) -> str:
    """A name that a batch of `with_raw_header_names` writes as these bytes; other languages' clients can."""
    name = _RawName(raw.decode(errors="replace"))
    name.raw = raw
    return name


def with_raw_header_names(batch: BatchBuilder, compression: str | None = None) -> BatchBuilder:
    """A batch that asks header names for their bytes; aiokafka's compiled builder doesn't."""
    codec = {None: 0, "gzip": 1, "zstd": 4}[compression]
    batch._builder = _DefaultRecordBatchBuilderPy(2, codec, 0, -1, -1, 0, 1_000_000)
    return batch


async def read_topic(site: Site, topic: str) -> list[ConsumerRecord]:
    """Every record of a topic, partition after partition."""
    client = AIOKafkaConsumer(bootstrap_servers=site.bootstrap, auto_offset_reset="earliest", group_id=None)
    await client.start()
    try:
        numbers = await client._client._wait_on_metadata(topic)
        partitions = [TopicPartition(topic, number) for number in numbers]
        client.assign(partitions)
        ends = await client.end_offsets(partitions)
        records: list[ConsumerRecord] = []
        while any([await client.position(tp) < end for tp, end in ends.items()]):
            for batch in (await client.getmany(timeout_ms=200)).values():
                records += batch
        return records
    finally:
        await client.stop()


async def read_until(
    site: Site, topic: str, enough: Callable[[list[ConsumerRecord]], bool], seconds: float = 40
) -> list[ConsumerRecord]:
    """Every record of a topic, once there are enough."""
    deadline = time.monotonic() + seconds
    while not enough(records := await read_topic(site, topic)):
        assert time.monotonic() < deadline, f"only {len(records)} records in {topic} after {seconds} s"
        await asyncio.sleep(0.1)
    return records


async def recommendations_for(site: Site, clicks: int, seconds: float = 60) -> list[dict[str, Any]]:
    """All recommendations, once that many clicks have one."""

    def enough(records: list[ConsumerRecord]) -> bool:
        return len({source_of(json.loads(record.value)) for record in records}) >= clicks

    records = await read_until(site, site.recommendations, enough, seconds)
    for record in records:
        assert record.key.decode() == json.loads(record.value)["user_id"]
    return [json.loads(record.value) for record in records]


def source_of(recommendation: dict[str, Any]) -> tuple[str, int, int]:
    source = recommendation["source"]
    return source["topic"], source["partition"], source["offset"]


# -- the oracle


@torch.inference_mode()
def assert_list_is_right(
    bundle: Bundle, clicked: Sequence[str], items: Sequence[dict[str, Any]], *, tolerance: float, seen: int = 100
) -> None:
    """The list is the exact top-K after these clicks, without the last `seen` of them, up to a tolerance on scores."""
    rows = torch.tensor([bundle.catalogue.rows(list(clicked)).tolist()])
    encoding = bundle.model.encode(rows, torch.tensor([len(clicked)]))[:, -1]
    scores = bundle.model.scores(encoding)[0]
    scores[0] = -torch.inf
    scores[rows[0, -seen:]] = -torch.inf
    listed = [int(bundle.catalogue.rows([entry["item_id"]])[0]) for entry in items]
    given = torch.tensor([entry["score"] for entry in items])
    assert len(set(listed)) == len(listed)
    assert torch.allclose(scores[listed], given, atol=tolerance, rtol=0), (scores[listed], given)
    scores[listed] = -torch.inf
    assert scores.max() <= given.min() + tolerance
    assert (given.diff() <= 0).all()
