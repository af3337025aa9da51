"""The real broker that the tests of stream_app share, and topics of their own for each."""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from stream_app.dev.kafka.broker import LocalBroker
from tests.stream_app.secured import SecuredKafka, secured_kafka

CreateTopic = Callable[..., Awaitable[str]]


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBroker]:
    """One Kafka for the whole test run, on a free port. Its data are thrown away, so it is killed at the end."""
    local = LocalBroker(tmp_path_factory.mktemp("broker") / "data", port=0)
    local.start()
    try:
        yield local
    finally:
        local.kill()


@pytest.fixture(scope="session")
def bootstrap(broker: LocalBroker) -> str:
    return broker.bootstrap


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    """Another Kafka, which asks at its doors for certificates and passwords."""
    with secured_kafka(tmp_path_factory.mktemp("secured")) as kafka:
        yield kafka


@pytest.fixture
def unique_name() -> Callable[[str], str]:
    """A name that no other test uses: `unique_name("clicks")` is `clicks-3f2a9c1b`."""
    return lambda stem: f"{stem}-{uuid.uuid4().hex[:8]}"


@pytest.fixture
async def admin(bootstrap: str) -> AsyncIterator[AIOKafkaAdminClient]:
    client = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


@pytest.fixture
def create_topic(admin: AIOKafkaAdminClient, unique_name: Callable[[str], str]) -> CreateTopic:
    """`await create_topic("clicks", partitions=8)` creates a topic of a unique name and returns the name."""

    async def create(stem: str = "topic", partitions: int = 1, **configs: str) -> str:
        """Configs by their Kafka names with underscores for dots: `cleanup_policy="compact"`."""
        name = unique_name(stem)
        topic_configs = {key.replace("_", "."): value for key, value in configs.items()}
        topic = NewTopic(name, num_partitions=partitions, replication_factor=1, topic_configs=topic_configs)
        response = await admin.create_topics([topic])
        errors = [error for error in response.topic_errors if error[1] != 0]
        assert not errors, errors
        return name

    return create


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def eventually() -> Callable[[Callable[[], object], float], None]:
    """`eventually(condition, seconds)` returns once the condition holds, and fails at the deadline."""

    def wait(condition: Callable[[], object], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
            time.sleep(0.02)

    return wait


@pytest.fixture
def recreate(admin: AIOKafkaAdminClient) -> Callable[..., Awaitable[None]]:
    """`await recreate(name, partitions=4)` deletes a topic and makes it anew under its old name."""

    async def delete_and_create(name: str, partitions: int = 1, **configs: str) -> None:
        await admin.delete_topics([name])
        topic_configs = {key.replace("_", "."): value for key, value in configs.items()}
        async with asyncio.timeout(20):
            while True:
                response = await admin.create_topics([NewTopic(name, partitions, 1, topic_configs=topic_configs)])
                if response.topic_errors[0][1] == 0:
                    return
                await asyncio.sleep(0.05)  # the deletion is still under way

    return delete_and_create
