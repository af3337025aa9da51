"""Topics → ledger → report."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.structs import ConsumerRecord

from lrurec.bundle import load_bundle
from stream_app.committed import committed_offsets
from stream_app.errors import BrokerUnavailable, SettingsError
from stream_app.header_names import read_any_header_name
from stream_app.settings import Settings
from stream_app.topics import FoundTopic, verify_topics
from stream_app.verify.judge import judge
from stream_app.verify.ledger import Entry, Ledger
from stream_app.verify.oracle import Expectations, Kind, bytes_digest, check_bucket, click_payload
from stream_app.verify.report import Report
from stream_app.verify.unseen import Unseen

_POLL_RECORDS = 10_000
_POLL_SECONDS = 1.0
_TELL_SECONDS = 5.0


@dataclass(frozen=True)
class _Log:
    """How much of itself a topic still holds."""

    from_the_beginning: bool
    """Nothing has been deleted from its beginning."""
    whole: bool
    """Nothing in between is missing either: it has not been compacted."""


async def verify(settings: Settings, sample: float = 1.0, tell: Callable[[str], None] = lambda _: None) -> Report:
    """Read the topics up to where they end now, and compare what the worker wrote with what the clicks give.

    The clicks are read last, so a worker may go on meanwhile. Memory is bounded; the disk takes, in a temporary folder,
    about what the four topics do there.

    Args:
        settings: as the worker's.
        sample: the share of users to verify, above 0 and at most 1.
        tell: is given a line now and then.

    Raises:
        SettingsError: no model is named.
        TopicsError, BrokerUnavailable: topics are missing or unfit, or Kafka does not answer in time.
        lrurec.errors.LRURecError: the bundle is unreadable.
    """
    if settings.model is None:
        raise SettingsError("STREAM_APP_MODEL is not set: name the bundle that the worker runs with")
    bundle = load_bundle(settings.model)
    read_any_header_name()
    topics = await verify_topics(settings)
    committed = {partition: found.offset for partition, found in (await committed_offsets(settings)).items()}
    report = Report()
    with tempfile.TemporaryDirectory(prefix="stream-app-verify-") as folder:
        ledger = Ledger(Path(folder), sample)
        reading = _Reading(settings, topics, ledger, tell)
        rows = {item_id: row for row, item_id in enumerate(bundle.catalogue.item_ids, start=1)}
        await reading.values(settings.changelog_topic, Kind.STATE)
        recommendations = await reading.values(settings.recommendations_topic, Kind.RECOMMENDATION)
        letters = await reading.letters()
        clicks = await reading.clicks(rows, report)
        report.every_click = recommendations.whole and settings.publish == "each"
        expected = Expectations(
            bundle,
            settings.clicks_topic,
            topics[settings.clicks_topic].id.hex(),
            committed,
            settings.top_k,
            settings.recent_items,
            settings.exclude_seen,
            report.every_click,
            clicks.from_the_beginning,
            recommendations.from_the_beginning,
            letters.from_the_beginning,
        )
        tell("comparing")
        for entries in ledger.buckets():
            check_bucket(entries, expected, report)
    return report


@dataclass(frozen=True)
class _Reading:
    """The topics, one after the other, into the ledger."""

    settings: Settings
    topics: dict[str, FoundTopic]
    ledger: Ledger
    tell: Callable[[str], None]

    async def values(self, topic: str, kind: Kind) -> _Log:
        def note(record: ConsumerRecord) -> None:
            # Neither topic holds tombstones: one is no state and no recommendation.
            self._add(Entry(kind, record.partition, record.offset, record.key or b"", record.value or b""))

        return await self._read(topic, note)

    async def letters(self) -> _Log:
        def note(record: ConsumerRecord) -> None:
            headers = dict(record.headers)
            if (
                headers.get("__streams.errors.topic") == self.settings.clicks_topic.encode()
            ):  # else another application's
                place = b"%b/%b" % tuple(
                    headers.get(f"__streams.errors.{name}") or b"" for name in ("partition", "offset")
                )
                whole = not any(name.endswith("-left-out") for name in headers)
                digest = bytes_digest(record.key, record.value) if whole else b""
                self._add(Entry(Kind.LETTER, 0, 0, place, digest))

        return await self._read(self.settings.dead_letter_topic, note)

    async def clicks(self, rows: dict[str, int], report: Report) -> _Log:
        def note(record: ConsumerRecord) -> None:
            click = judge(record.key, record.value, self.settings.max_click_bytes)
            if click is None:
                place = b"%d/%d" % (record.partition, record.offset)
                self._add(Entry(Kind.POISON, 0, 0, place, bytes_digest(record.key, record.value)))
            elif click.item_id not in rows:
                report.unknown_items += 1
            elif not self.ledger.keeps(click.user):
                report.passed_over += 1
            else:
                payload = click_payload(rows[click.item_id], click.timestamp_ms, click.event_id)
                self._add(Entry(Kind.CLICK, record.partition, record.offset, click.user, payload))

        return await self._read(self.settings.clicks_topic, note)

    def _add(self, entry: Entry) -> None:
        if self.ledger.keeps(entry.key):
            self.ledger.add(entry)

    async def _read(self, topic: str, note: Callable[[ConsumerRecord], None]) -> _Log:
        """Give every record up to the topic's present end to `note`, partition by partition in order."""
        consumer = AIOKafkaConsumer(
            isolation_level="read_committed",
            **self.settings.kafka_client(),
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )
        try:
            async with asyncio.timeout(self.settings.broker_timeout_seconds):
                await consumer.start()
                partitions = [TopicPartition(topic, number) for number in range(self.topics[topic].partitions)]
                starts = await consumer.beginning_offsets(partitions)
                ends = await consumer.end_offsets(partitions)
                unseen = Unseen(consumer, ends)
                consumer.assign(partitions)
            count = await self._read_to(consumer, ends, note)
        except (KafkaError, TimeoutError) as error:
            raise BrokerUnavailable(
                f"Kafka at {self.settings.broker} did not let {topic} be read to its end: {error!r}; is it up?"
            ) from None
        finally:
            await consumer.stop()
        return _Log(not any(starts.values()), count + unseen.count == sum(ends.values()))

    async def _read_to(
        self, consumer: AIOKafkaConsumer, ends: dict[TopicPartition, int], note: Callable[[ConsumerRecord], None]
    ) -> int:
        count, heard, told = 0, time.monotonic(), time.monotonic()
        left = {partition for partition, end in ends.items() if end > 0}
        while left:
            polled = await consumer.getmany(timeout_ms=int(_POLL_SECONDS * 1000), max_records=_POLL_RECORDS)
            for partition, records in polled.items():
                before_the_end = [record for record in records if record.offset < ends[partition]]
                count += len(before_the_end)
                for record in before_the_end:
                    note(record)
            # Not by the records: the last ones of a compacted partition may be gone.
            left = {partition for partition in left if await consumer.position(partition) < ends[partition]}
            now = time.monotonic()
            heard = now if polled else heard
            if now - heard > self.settings.broker_timeout_seconds:
                raise TimeoutError
            if now - told > _TELL_SECONDS:
                self.tell(f"{count:,} records of {next(iter(ends)).topic}")
                told = now
        return count
