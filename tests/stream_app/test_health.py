"""The health port tells what is so, and the metrics count what a micro-batch did."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from stream_app.errors import WorkerError
from stream_app.health import HealthServer
from stream_app.messages import DeadLetter
from stream_app.metrics import Metrics, value
from stream_app.micro_batch import Outbox
from stream_app.settings import Settings


class Worker:
    """The worker as the health port sees it."""

    def __init__(self):
        self.metrics = Metrics()
        self.ready = False

    def refresh(self):
        self.metrics.ready.set(self.ready)


@pytest.fixture
def worker():
    return Worker()


@pytest.fixture
async def get(worker, unused_tcp_port):
    """`await get("/live")` is (status, content type, text)."""
    server = HealthServer(worker.metrics, lambda: worker.ready, worker.refresh)
    await server.start("127.0.0.1", unused_tcp_port)

    async def fetch(path):
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{unused_tcp_port}") as session,
            session.get(path) as response,
        ):
            return response.status, response.headers["Content-Type"], await response.text()

    yield fetch
    await server.stop()


def samples(text):
    return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples if not s.labels}


@pytest.mark.parametrize("ready", [True, False])
async def test_live_is_answered_whether_ready_or_not(get, worker, ready):
    worker.ready = ready
    assert (await get("/live"))[0] == 200


async def test_ready_follows_the_worker(get, worker):
    assert (await get("/ready"))[::2] == (
        503,
        "not ready: restoring states, rebalancing, or without an answer from Kafka\n",
    )
    worker.ready = True
    assert (await get("/ready"))[::2] == (200, "ready\n")
    worker.ready = False
    assert (await get("/ready"))[0] == 503


async def test_metrics_are_refreshed_and_in_prometheus_format(get, worker):
    worker.ready = True
    status, content_type, text = await get("/metrics")
    assert status == 200
    assert content_type.startswith("text/plain; version=0.0.4")
    assert samples(text)["stream_app_ready"] == 1
    worker.ready = False
    assert samples((await get("/metrics"))[2])["stream_app_ready"] == 0


async def test_metrics_count_what_a_micro_batch_did(get, worker):
    outbox = Outbox(
        recommendations={0: [(b"u", b"{}")] * 3, 4: [(b"u", b"{}")] * 2},
        dead_letters={0: [DeadLetter(None, None, [])] * 2},
        applied=7,
        skipped=3,
        unknown_items=4,
    )
    worker.metrics.count(outbox, 0.02)
    worker.metrics.count(Outbox(applied=1), 30.0)
    found = samples((await get("/metrics"))[2])
    assert {name: found[name] for name in found if name.endswith("_total")} == {
        "stream_app_clicks_applied_total": 8,
        "stream_app_clicks_skipped_total": 3,
        "stream_app_clicks_unknown_item_total": 4,
        "stream_app_dead_letters_total": 2,
        "stream_app_recommendations_total": 5,
        "stream_app_micro_batches_total": 2,
    }
    assert found["stream_app_micro_batch_seconds_count"] == 2
    assert found["stream_app_micro_batch_seconds_sum"] == pytest.approx(30.02)


async def test_lag_is_told_by_partition(get, worker):
    worker.metrics.lag.labels(3).set(12)
    families = text_string_to_metric_families((await get("/metrics"))[2])
    [lag] = [family for family in families if family.name == "stream_app_lag_clicks"]
    assert [(sample.labels, sample.value) for sample in lag.samples] == [({"partition": "3"}, 12)]


async def test_another_path_is_not_found(get):
    assert (await get("/"))[0] == 404


def test_two_workers_in_one_process_count_apart():
    first, second = Metrics(), Metrics()
    first.count(Outbox(applied=2), 0)
    assert (value(first.applied), value(second.applied)) == (2, 0)


async def test_a_port_that_is_taken_is_refused_with_the_setting_to_change(get, worker, unused_tcp_port):
    second = HealthServer(worker.metrics, lambda: True, worker.refresh)
    with pytest.raises(WorkerError, match=rf"127\.0\.0\.1:{unused_tcp_port} .*STREAM_APP_WEB_PORT, 0 for none"):
        await second.start("127.0.0.1", unused_tcp_port)
    await second.stop()
    assert (await get("/live"))[0] == 200


async def test_an_address_of_another_machine_is_refused(worker, unused_tcp_port):
    server = HealthServer(worker.metrics, lambda: True, worker.refresh)
    with pytest.raises(WorkerError, match=r"can't listen on 203\.0\.113\.1"):
        await server.start("203.0.113.1", unused_tcp_port)
    await server.stop()


async def test_unless_told_otherwise_only_this_machine_is_answered(worker, unused_tcp_port):
    async def is_answered():
        # An address that is not 127.0.0.1, as any network's would be; Linux has the whole block.
        reader_and_writer = asyncio.open_connection("127.0.0.2", unused_tcp_port)
        try:
            _, writer = await asyncio.wait_for(reader_and_writer, 5)
        except OSError:
            return False
        writer.close()
        await writer.wait_closed()
        return True

    for host, answered in [(Settings().web_host, False), ("0.0.0.0", True)]:  # noqa: S104
        server = HealthServer(worker.metrics, lambda: True, worker.refresh)
        await server.start(host, unused_tcp_port)
        try:
            assert await is_answered() == answered
        finally:
            await server.stop()


async def test_a_stopped_server_listens_no_more(worker, unused_tcp_port):
    server = HealthServer(worker.metrics, lambda: True, worker.refresh)
    await server.start("127.0.0.1", unused_tcp_port)
    await server.stop()
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.get(f"http://127.0.0.1:{unused_tcp_port}/live")


async def test_a_server_that_never_started_can_be_stopped(worker):
    await HealthServer(worker.metrics, lambda: True, worker.refresh).stop()
