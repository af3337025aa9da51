"""A recovery that Kafka keeps waiting ends the worker at once and says so, not alive and never ready."""

from __future__ import annotations

import asyncio

import faust
import pytest
from faust.tables.recovery import RebalanceAgain, ServiceStopped

from stream_app.errors import WorkerError
from stream_app.recovery import OutspokenRecovery
from tests.stream_app.test_state_table import make_store


@pytest.fixture
async def app(tmp_path) -> faust.App:
    return make_store(tmp_path).app


def recovery_of(app: faust.App) -> OutspokenRecovery:
    recovery = app.tables.recovery
    assert isinstance(recovery, OutspokenRecovery)
    return recovery


async def test_a_step_that_kafka_does_not_answer_in_time_ends_the_worker(app):
    with pytest.raises(ServiceStopped):
        await recovery_of(app)._wait(asyncio.Event().wait(), timeout=0.01)
    assert isinstance(app.crash_reason, WorkerError)
    assert str(app.crash_reason) == "Kafka took longer than 0.01 seconds for a step of restoring the states"


async def test_a_step_in_time_and_a_rebalance_meanwhile_end_nothing(app):
    recovery = recovery_of(app)
    await recovery._wait(asyncio.sleep(0), timeout=10)
    recovery.signal_recovery_start.set()
    with pytest.raises(RebalanceAgain):
        await recovery._wait(asyncio.Event().wait(), timeout=10)
    assert app.crash_reason is None


async def test_a_worker_that_stops_meanwhile_is_no_crash(app):
    recovery = recovery_of(app)
    waiting = asyncio.create_task(recovery._wait(asyncio.Event().wait(), timeout=10))
    await asyncio.sleep(0)
    recovery._stopped.set()
    with pytest.raises(ServiceStopped):
        await waiting
    assert app.crash_reason is None
