"""The four topics: created by `stream-app topics`, verified before a worker starts.

A topic that is there already is never altered: a mismatch is an error that says how to mend it. Only what correctness
rests on is verified, which is the partition counts and the cleanup policies. Retention, segment sizes and replicas of
an existing topic are its owner's business; what a new topic gets is in `wanted_topics`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaConnectionError, KafkaError, NodeNotReadyError

from stream_app.errors import BrokerUnavailable, TopicsError
from stream_app.refusal import find_refusal
from stream_app.settings import Settings
from stream_app.topic_metadata import describe

_POLICY = "cleanup.policy"
_MAX_BYTES = "max.message.bytes"
_LEAST_DEAD_LETTER_BYTES = 2_048
# What a worker writes gets Kafka's time: by the worker's own, Kafka would refuse it when that clock is an hour ahead.
_KAFKAS_TIME = {"message.timestamp.type": "LogAppendTime"}
_POLL_SECONDS = 0.05
_MOST_REPLICAS = 3
_UNKNOWN_TOPIC, _ALREADY_EXISTS = 3, 36  # Kafka's error codes
# A compacted topic's newest segment is never compacted, and recovery reads it whole: smaller than Kafka's 1 GiB.
_COMPACTED_SEGMENT_BYTES = 128 * 2**20
# A dead letter is the click's bytes plus headers: a click as large as its topic allows must still fit.
_DEAD_LETTER_BYTES = 2 * 2**20


@dataclass(frozen=True, slots=True)
class WantedTopic:
    name: str
    partitions: int
    """What it is created with."""
    partitions_matter: bool
    """Whether another count is an error."""
    policies: tuple[str, ...]
    """The values of cleanup.policy that are right, the one it is created with first."""
    why: str
    """What a wrong policy or partition count would do."""
    configs: Mapping[str, str] = field(default_factory=dict)
    """Further configuration that it is created with."""


@dataclass(frozen=True, slots=True)
class FoundTopic:
    id: bytes
    """Kafka's own, see `topic_metadata`; a topic made anew under the same name has another."""
    partitions: int
    policy: str
    max_message_bytes: int
    """The largest record batch that it takes."""
    has_leaders: bool = True
    """Whether every partition can be read and written."""


@dataclass(frozen=True, slots=True)
class TopicOutcome:
    """What `ensure_topics` did about one topic."""

    name: str
    created: bool
    partitions: int
    policy: str


def wanted_topics(settings: Settings) -> tuple[WantedTopic, ...]:
    """Clicks and dead letters are kept as long as the broker keeps topics by default; the other two are compacted."""
    compacted = {"segment.bytes": str(_COMPACTED_SEGMENT_BYTES), **_KAFKAS_TIME}
    return (
        WantedTopic(
            settings.clicks_topic,
            settings.partitions,
            partitions_matter=True,
            policies=("delete",),
            why="compaction would drop clicks, another partition count would part users from their states",
        ),
        WantedTopic(
            settings.recommendations_topic,
            settings.partitions,
            partitions_matter=False,
            policies=("compact", "compact,delete"),
            why="without compaction it grows for ever, or forgets users who have not clicked for a while",
            configs=compacted,
        ),
        WantedTopic(
            settings.dead_letter_topic,
            1,
            partitions_matter=False,
            policies=("delete",),
            why="a compacted topic refuses letters without a key",
            configs={_MAX_BYTES: str(_DEAD_LETTER_BYTES), **_KAFKAS_TIME},
        ),
        WantedTopic(
            settings.changelog_topic,
            settings.partitions,
            partitions_matter=True,
            policies=("compact",),
            why="user states would be lost, or restored to partitions where their users do not click",
            configs=compacted,
        ),
    )


def mismatches(wanted: WantedTopic, found: FoundTopic, settings: Settings) -> list[str]:
    """What is wrong with a topic, each with the value found, the value wanted, and how to mend it."""
    wrong = []
    if wanted.partitions_matter and found.partitions != wanted.partitions:
        wrong.append(
            f"topic {wanted.name} has {found.partitions} partitions, wanted {wanted.partitions} ({wanted.why}): "
            + _mend_partitions(wanted, found, settings)
        )
    if _normal(found.policy) not in {_normal(policy) for policy in wanted.policies}:
        wrong.append(
            f"topic {wanted.name} has {_POLICY}={found.policy}, wanted {' or '.join(wanted.policies)} ({wanted.why}):"
            f" kafka-configs.sh --bootstrap-server {settings.broker} --alter --entity-type topics"
            f" --entity-name {wanted.name} --add-config {_POLICY}={wanted.policies[0]}"
        )
    if wanted.name == settings.dead_letter_topic and found.max_message_bytes < _LEAST_DEAD_LETTER_BYTES:
        wrong.append(
            f"topic {wanted.name} has {_MAX_BYTES}={found.max_message_bytes}, wanted {_LEAST_DEAD_LETTER_BYTES:,} at"
            f" least (the reason of a dead letter would not fit): kafka-configs.sh --bootstrap-server {settings.broker}"
            f" --alter --entity-type topics --entity-name {wanted.name} --add-config {_MAX_BYTES}={_DEAD_LETTER_BYTES}"
        )
    return wrong


def _mend_partitions(wanted: WantedTopic, found: FoundTopic, settings: Settings) -> str:
    if wanted.name == settings.changelog_topic:
        return (
            "it must have as many as the clicks topic: choose another STREAM_APP_APP_ID, which begins with new states"
        )
    return f"set STREAM_APP_PARTITIONS={found.partitions}, or name another topic by STREAM_APP_CLICKS_TOPIC"


def _normal(policy: str) -> frozenset[str]:
    return frozenset(part.strip() for part in policy.split(","))


async def ensure_topics(settings: Settings) -> list[TopicOutcome]:
    """Create the topics that are missing, verify all; the second time it only verifies.

    Raises:
        BrokerUnavailable: no answer within `broker_timeout_seconds`, all steps together.
        TopicsError: a topic can't be created, or one that is there does not fit.
    """
    wanted = wanted_topics(settings)
    async with admin_client(settings) as admin:
        there = await _find(admin, wanted)
        _refuse_mismatches([topic for topic in wanted if topic.name in there], there, settings)
        missing = [topic for topic in wanted if topic.name not in there]
        if missing:
            await _create(admin, missing, settings)
        found = await _find_all(admin, wanted)
    _refuse_mismatches(wanted, found, settings)
    return [
        TopicOutcome(topic.name, topic in missing, found[topic.name].partitions, found[topic.name].policy)
        for topic in wanted
    ]


async def verify_topics(settings: Settings) -> dict[str, FoundTopic]:
    """The four topics by name, if none is missing or unfit; creates nothing.

    Raises:
        BrokerUnavailable: no answer within `broker_timeout_seconds`, all steps together.
        TopicsError: names every topic that is missing or unfit, and what to do.
    """
    wanted = wanted_topics(settings)
    async with admin_client(settings) as admin:
        found = await _find(admin, wanted)
    missing = [topic.name for topic in wanted if topic.name not in found]
    if missing:
        raise _missing(settings, missing)
    leaderless = [name for name, topic in found.items() if not topic.has_leaders]
    if leaderless:
        raise TopicsError(
            f"topic {', topic '.join(leaderless)} on {settings.broker} has partitions without a leader:"
            " bring the brokers that hold them back"
        )
    _refuse_mismatches(wanted, found, settings)
    return found


async def require_topic(settings: Settings, name: str) -> None:
    """Refuse a topic that is not there, before a client waits for it or Kafka creates it unasked.

    Raises:
        BrokerUnavailable: no answer within `broker_timeout_seconds`.
        TopicsError: there is no such topic.
    """
    async with admin_client(settings) as admin:
        there = await describe(admin, [name])
    if name not in there:
        raise _missing(settings, [name])


def _missing(settings: Settings, names: Sequence[str]) -> TopicsError:
    return TopicsError(f"missing on {settings.broker}: topic {', topic '.join(names)}; create with: stream-app topics")


def _refuse_mismatches(wanted: Sequence[WantedTopic], found: Mapping[str, FoundTopic], settings: Settings) -> None:
    # The changelog has to have as many partitions as the clicks topic, whatever the setting says.
    clicks = found.get(settings.clicks_topic)
    judged = [
        replace(each, partitions=clicks.partitions) if clicks and each.name == settings.changelog_topic else each
        for each in wanted
    ]
    wrong = [text for topic in judged for text in mismatches(topic, found[topic.name], settings)]
    if wrong:
        raise TopicsError("; ".join(wrong))


@asynccontextmanager
async def admin_client(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    """An admin client for a block that ends within `broker_timeout_seconds`, with errors an operator can act on.

    Raises:
        AccessRefused: Kafka does not let this client in, or is not who it should be.
        BrokerUnavailable: it does not answer, or not as Kafka does.
    """
    admin = AIOKafkaAdminClient(**settings.kafka_client())
    try:
        async with asyncio.timeout(settings.broker_timeout_seconds):
            try:
                await admin.start()
                yield admin
            except (KafkaConnectionError, NodeNotReadyError):
                raise await find_refusal(settings) or _unavailable(settings, "cannot be reached") from None
    except TimeoutError:
        raise _unavailable(settings, f"did not answer within {settings.broker_timeout_seconds:g} s") from None
    except (KafkaError, OSError) as error:
        raise _unavailable(settings, f"cannot be used ({error})") from error
    finally:
        await admin.close()


def _unavailable(settings: Settings, what: str) -> BrokerUnavailable:
    return BrokerUnavailable(
        f"Kafka at {settings.broker} {what}; start a local one with: stream-app broker,"
        " or name yours by STREAM_APP_BROKER"
    )


async def _find(admin: AIOKafkaAdminClient, wanted: Sequence[WantedTopic]) -> dict[str, FoundTopic]:
    """Those of the topics that exist."""
    there = await describe(admin, [topic.name for topic in wanted])
    return {
        name: FoundTopic(
            there[name].id,
            there[name].partitions,
            configs[_POLICY],
            int(configs[_MAX_BYTES]),
            there[name].has_leaders,
        )
        for name, configs in (await _configs(admin, list(there))).items()
    }


async def _configs(admin: AIOKafkaAdminClient, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """What is verified of the configuration of the topics that the answering broker knows."""
    if not names:
        return {}
    resources = [ConfigResource(ConfigResourceType.TOPIC, name, {_POLICY: "", _MAX_BYTES: ""}) for name in names]
    configs = {}
    for response in await admin.describe_configs(resources):
        for code, message, _, name, entries in response.resources:
            if code == _UNKNOWN_TOPIC:
                continue
            if code:
                raise TopicsError(f"topic {name}: its configuration can't be read: {message or f'Kafka error {code}'}")
            configs[name] = {entry[0]: entry[1] for entry in entries}
    return configs


async def _find_all(admin: AIOKafkaAdminClient, wanted: Sequence[WantedTopic]) -> dict[str, FoundTopic]:
    """Wait until every broker that is asked knows the topics and their leaders. The caller holds the deadline."""
    while True:
        found = await _find(admin, wanted)
        if len(found) == len(wanted) and all(topic.has_leaders for topic in found.values()):
            return found
        await asyncio.sleep(_POLL_SECONDS)


async def _create(admin: AIOKafkaAdminClient, missing: Sequence[WantedTopic], settings: Settings) -> None:
    replicas = settings.replication_factor or min(_MOST_REPLICAS, len((await admin.describe_cluster())["brokers"]))
    response = await admin.create_topics([_new_topic(topic, replicas) for topic in missing])
    for name, code, message in response.topic_errors:
        # Somebody else may have created it at the same moment: then it is verified like any other.
        if code not in {0, _ALREADY_EXISTS}:
            raise TopicsError(f"topic {name} can't be created: {message or f'Kafka error {code}'}")


def _new_topic(topic: WantedTopic, replicas: int) -> NewTopic:
    configs = {_POLICY: topic.policies[0], **topic.configs}
    if replicas >= _MOST_REPLICAS:
        configs["min.insync.replicas"] = str(replicas - 1)  # an acknowledged write survives the loss of one broker
    return NewTopic(topic.name, topic.partitions, replicas, topic_configs=configs)
