"""The proof holds for what a worker wrote, and fails for every way in which it could be wrong. On a real broker."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.structs import ConsumerRecord

from lrurec.bundle import save_bundle
from lrurec.convert import convert
from stream_app.settings import Settings
from stream_app.verify.report import FAULTS, Report
from stream_app.verify.verify import verify
from tests.stream_app.live import Site, WorkerProcess, click, produce, read_topic, run_command, wait_until

GOLDEN = Path(__file__).parents[2] / "lrurec" / "golden" / "public_large_d64_b2.npz"


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bundle"
    save_bundle(folder, convert(GOLDEN))
    return folder


def records(seed: int) -> list[tuple[bytes | None, bytes | None]]:
    """400 clicks of 40 users, a busy one among them, and among them unknown items and poison."""
    rng = random.Random(seed)
    clicks = [
        click(f"user-{int(40 * rng.random() ** 3)}", str(rng.randint(1, 200)), event_id=f"e{n}") for n in range(400)
    ]
    others: list[tuple[bytes | None, bytes | None]] = [
        click("user-0", "no such item"),
        (b"user-1", b"poison"),
        (None, clicks[0][1]),
        (b"user-2", None),
        (b"user-3", b'{"user_id": "user-3", "item_id": "1", "timestamp_ms": 1, "note": "\\ud800"}'),
    ]
    mixed: list[tuple[bytes | None, bytes | None]] = list(clicks)
    for other in others:
        mixed.insert(rng.randrange(len(mixed)), other)
    return mixed


class Stage:
    """A worker's finished work, and ways to spoil it."""

    def __init__(self, site: Site, client: AIOKafkaProducer) -> None:
        self.site = site
        self._client = client
        self.settings = Settings.from_environment(site.environment())

    async def verify(self, **options: Any) -> Report:
        return await verify(self.settings, **options)

    async def write(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, headers: Any = ()
    ) -> None:
        await self._client.send_and_wait(topic, value, key, partition, headers=list(headers))

    async def newest(self, topic: str, place: int) -> ConsumerRecord:
        """The last record of one of the topic's users, who are in alphabetical order."""
        return (await self.all_newest(topic))[place]

    async def all_newest(self, topic: str) -> list[ConsumerRecord]:
        newest = {record.key or b"": record for record in await read_topic(self.site, topic)}
        return [newest[key] for key in sorted(newest)]

    async def commit(self, partition: int, offset: int) -> None:
        """Acknowledge clicks in the group's name, without having worked on them."""
        group = AIOKafkaConsumer(
            bootstrap_servers=self.site.bootstrap, group_id=self.site.name, enable_auto_commit=False
        )
        await group.start()
        try:
            place = TopicPartition(self.site.clicks, partition)
            group.assign([place])
            await group.commit({place: offset})
        finally:
            await group.stop()


@pytest.fixture
async def stage(
    request: pytest.FixtureRequest,
    bootstrap: str,
    unique_name: Callable[[str], str],
    bundle_folder: Path,
    tmp_path: Path,
) -> AsyncIterator[Stage]:
    site = Site(bootstrap, unique_name("app"), bundle_folder, tmp_path, partitions=3)
    site.extra["STATE_DTYPE"] = getattr(request, "param", "float16")
    site.create_topics()
    await produce(site, records(seed=1))
    with WorkerProcess(site) as worker:
        worker.wait_ready()
        wait_until(lambda: worker.metric("clicks_applied_total") == 400, 30, worker.tail)
        assert worker.terminate() == 0, worker.tail()
    client = AIOKafkaProducer(bootstrap_servers=bootstrap)
    await client.start()
    try:
        yield Stage(site, client)
    finally:
        await client.stop()


def faults_of(report: Report) -> dict[str, int]:
    return {name: count for name, count in report.faults.items() if count}


@pytest.mark.parametrize("stage", ["float16", "float32"], indirect=True)
async def test_a_workers_work_is_proven_and_every_kind_of_fault_in_it_found(stage: Stage) -> None:
    report = await stage.verify()
    assert report.clean, report.as_text()
    assert (report.clicks, report.unknown_items, report.poison, report.dead_letters) == (400, 1, 4, 4)
    assert (report.users, report.states >= report.users, report.recommendations) == (40, True, 400)
    assert (report.verified_users, report.acknowledged_clicks, report.overtaken_users) == (40, 400, 0)
    assert report.every_click
    expected: Counter[str] = Counter()
    for spoil in SPOILS:
        expected.update(await spoil(stage))
        report = await stage.verify()
        assert faults_of(report) == expected, f"{spoil.__name__}: {report.as_text()}"
    assert expected.keys() == set(FAULTS)
    as_command = run_command(["verify", "--json"], stage.site.environment())
    assert as_command.returncode == 1, as_command.stderr
    assert json.loads(as_command.stdout)["faults"] == report.faults


async def write_a_state_with_another_ring(stage: Stage) -> dict[str, int]:
    record = await stage.newest(stage.site.changelog, 0)
    state = bytearray(record.value)
    state[56] ^= 1
    await stage.write(stage.site.changelog, record.partition, record.key, bytes(state))
    return {"wrong_states": 1}


async def write_a_state_with_other_hidden_numbers(stage: Stage) -> dict[str, int]:
    record = await stage.newest(stage.site.changelog, 1)
    state = bytearray(record.value)
    state[-64:] = state[-128:-64]
    await stage.write(stage.site.changelog, record.partition, record.key, bytes(state))
    return {"wrong_states": 1}


async def write_bytes_that_are_no_state(stage: Stage) -> dict[str, int]:
    await stage.write(stage.site.changelog, 0, b"nobody", b"no state")
    return {"wrong_states": 1}


async def exchange_two_items(stage: Stage) -> dict[str, int]:
    record = await stage.newest(stage.site.recommendations, 0)
    document = json.loads(record.value)
    first, *_, last = document["items"]
    first["item_id"], last["item_id"] = last["item_id"], first["item_id"]
    await stage.write(stage.site.recommendations, record.partition, record.key, json.dumps(document).encode())
    return {"conflicting_recommendations": 1, "wrong_recommendations": 1}


async def repeat_a_recommendation_at_another_time(stage: Stage) -> dict[str, int]:
    record = await stage.newest(stage.site.recommendations, 1)
    document = json.loads(record.value) | {"generated_at_ms": 1}
    await stage.write(stage.site.recommendations, record.partition, record.key, json.dumps(document).encode())
    return {}


async def recommend_after_a_click_that_nobody_made(stage: Stage) -> dict[str, int]:
    record = await stage.newest(stage.site.recommendations, 2)
    document = json.loads(record.value)
    document["source"]["offset"] = 1_000_000
    await stage.write(stage.site.recommendations, record.partition, record.key, json.dumps(document).encode())
    return {"wrong_recommendations": 1}


async def acknowledge_records_without_working_on_them(stage: Stage) -> dict[str, int]:
    end = sum(record.partition == 1 for record in await read_topic(stage.site, stage.site.clicks))
    await stage.write(stage.site.clicks, 1, *click("somebody new", "5"))
    await stage.write(stage.site.clicks, 1, b"somebody new", b"poison")
    await stage.commit(1, end + 2)
    return {"missing_states": 1, "missing_recommendations": 1, "missing_dead_letters": 1}


async def change_an_old_recommendation(stage: Stage) -> dict[str, int]:
    """Not the last of its user: nobody computes its items, but what it says of its click is looked at."""
    found = await read_topic(stage.site, stage.site.recommendations)
    [*_, old, _] = [json.loads(record.value) for record in found if record.key == b"user-3"]
    place = next(record for record in found if json.loads(record.value) == old)
    spoilt = json.dumps(old | {"clicks": 10_000}).encode()
    await stage.write(stage.site.recommendations, place.partition, place.key, spoilt)
    return {"conflicting_recommendations": 1, "wrong_recommendations": 1}


async def write_what_is_no_recommendation(stage: Stage) -> dict[str, int]:
    document = json.loads((await stage.newest(stage.site.recommendations, 3)).value)
    source = document["source"]
    nonsense = [
        json.dumps(document | {"source": source | {"offset": str(source["offset"])}}).encode(),
        json.dumps(document | {"clicks": None}).encode(),
        b'{"user_id":' + b"[" * 500 + b"]" * 500 + b"}",
        b"[]",
        None,
    ]
    for value in nonsense:
        await stage.write(stage.site.recommendations, 0, document["user_id"].encode(), value)
    return {"wrong_recommendations": len(nonsense)}


async def write_a_tombstone(stage: Stage) -> dict[str, int]:
    record = await stage.newest(stage.site.changelog, 5)
    await stage.write(stage.site.changelog, record.partition, record.key, None)
    return {"wrong_states": 1}


async def change_the_bytes_of_a_dead_letter(stage: Stage) -> dict[str, int]:
    letter = await stage.newest(stage.site.dead_letters, 0)
    await stage.write(stage.site.dead_letters, 0, letter.key, b"other bytes", letter.headers)
    return {"wrong_dead_letters": 1}


SPOILS = (
    write_a_state_with_another_ring,
    write_a_state_with_other_hidden_numbers,
    write_bytes_that_are_no_state,
    exchange_two_items,
    repeat_a_recommendation_at_another_time,
    recommend_after_a_click_that_nobody_made,
    change_an_old_recommendation,
    write_what_is_no_recommendation,
    write_a_tombstone,
    acknowledge_records_without_working_on_them,
    change_the_bytes_of_a_dead_letter,
)


async def test_a_sample_holds_some_users_and_finds_what_is_wrong_with_them(stage: Stage) -> None:
    half = await stage.verify(sample=0.5)
    assert half.clean, half.as_text()
    assert 0 < half.users < 40
    for record in await stage.all_newest(stage.site.changelog):
        state = bytearray(record.value)
        state[56] ^= 1
        await stage.write(stage.site.changelog, record.partition, record.key, bytes(state))
    spoilt = await stage.verify(sample=0.5)
    assert faults_of(spoilt) == {"wrong_states": half.users}


async def test_a_sample_without_a_user_verifies_nothing_and_says_so(stage: Stage) -> None:
    report = await stage.verify(sample=1e-10)
    assert report.passed_over == 400
    assert not report.clean
    assert report.as_text().endswith("NOTHING VERIFIED")


async def test_users_whose_first_clicks_are_gone_are_counted_and_not_blamed(
    stage: Stage, admin: AIOKafkaAdminClient
) -> None:
    await admin.delete_records({TopicPartition(stage.site.clicks, 0): RecordsToDelete(before_offset=50)})
    report = await stage.verify()
    assert report.unverifiable_users > 0
    assert faults_of(report) == {}, report.as_text()


async def test_an_old_state_that_is_the_last_of_its_user_is_told(stage: Stage) -> None:
    busy = await stage.newest(stage.site.changelog, 0)
    old = busy.value[:32] + bytes(8) + busy.value[40:]  # source_offset 0
    await stage.write(stage.site.changelog, busy.partition, busy.key, old)
    report = await stage.verify()
    assert report.clean, report.as_text()
    assert report.overtaken_users == 1
    assert "1 users' last state in the changelog is not their newest" in report.as_text()


async def test_clicks_of_which_none_is_acknowledged_prove_nothing(
    bootstrap: str, unique_name: Callable[[str], str], bundle_folder: Path, tmp_path: Path
) -> None:
    site = Site(bootstrap, unique_name("app"), bundle_folder, tmp_path, partitions=3)
    site.create_topics()
    settings = Settings.from_environment(site.environment())
    empty = await verify(settings)
    assert empty.clean
    await produce(site, records(seed=3))
    report = await verify(settings)
    assert not report.clean
    assert report.as_text().endswith("NOTHING VERIFIED")


async def test_a_running_worker_is_verified_without_stopping_it(
    bootstrap: str, unique_name: Callable[[str], str], bundle_folder: Path, tmp_path: Path
) -> None:
    site = Site(bootstrap, unique_name("app"), bundle_folder, tmp_path, partitions=3)
    site.create_topics()
    settings = Settings.from_environment(site.environment())
    rng = random.Random(2)
    with WorkerProcess(site, MAX_BATCH="100") as worker:
        worker.wait_ready()
        for _ in range(4):
            await produce(site, [click(f"user-{rng.randrange(30)}", str(rng.randint(1, 200))) for _ in range(1_500)])
            report = await verify(settings)
            assert report.clean, report.as_text()
    assert report.clicks == 6_000
