"""The composition root: every part of the worker is made here and handed to the next. See docs/architecture.md."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import faust
from faust.assignor.partition_assignor import PartitionAssignor
from mode.supervisors import CrashingSupervisor
from yarl import URL

from lrurec.bundle import Bundle, load_bundle
from lrurec.serving import build_engine, state_layout
from lrurec.user_state import StateLayout
from stream_app.committed import commit_note
from stream_app.delivery import AtLeastOnce, Delivery, Topics
from stream_app.errors import SettingsError
from stream_app.health import HealthServer
from stream_app.messages import ClickLimits
from stream_app.metrics import Metrics
from stream_app.micro_batch import MicroBatcher
from stream_app.pipeline import Pipeline
from stream_app.publisher import Publisher
from stream_app.recommendations import RecommendationEncoder
from stream_app.record_batches import RecordBatchConsumer, RecordBatchSchema, RecordBatchTransport
from stream_app.settings import Settings
from stream_app.state_table import StoreOptions, UserStateTable, user_state_table
from stream_app.topics import FoundTopic
from stream_app.transactions import ExactlyOnce, Group, Limits

#: Events that may wait in Faust's queue. The transport's own limit, in clicks, is far below, so that Faust never finds
#: it full: it would stop polling for a second.
_QUEUE = 65_536

#: An upper bound of what Kafka adds to the key and the value of a record that is alone in its batch.
_RECORD_BYTES = 128

#: Seconds after which a member notices partitions that Kafka did not tell of while the group was formed.
_METADATA_SECONDS = 10


@dataclass(frozen=True)
class Parts:
    """The assembled worker, not yet started; `worker.run_worker` starts and stops it."""

    app: faust.App
    clicks_topic: str
    bundle: Bundle
    table: UserStateTable
    delivery: Delivery[Any]
    pipeline: Pipeline
    health: HealthServer
    metrics: Metrics


def build_parts(settings: Settings, topics: Mapping[str, FoundTopic]) -> Parts:
    """Read the bundle and assemble the worker on these verified topics. Needs a running event loop.

    Raises:
        SettingsError: no bundle is named, or it can't be used with these settings.
        lrurec.errors.LRURecError: the bundle is unreadable, or the device isn't there.
    """
    if settings.model is None:
        raise SettingsError(
            "STREAM_APP_MODEL is not set: name a bundle, a folder written by `lrurec train` or `lrurec convert`"
        )
    bundle = load_bundle(settings.model)
    clicks_id, changelog_id = topics[settings.clicks_topic].id, topics[settings.changelog_topic].id
    layout = state_layout(bundle, settings.state_dtype, settings.recent_items, source_log=clicks_id.hex())
    engine = build_engine(
        bundle,
        layout,
        top_k=settings.top_k,
        exclude_seen=settings.exclude_seen,
        device=settings.device,
        max_batch=settings.max_batch,
    )
    ids = ["", *bundle.catalogue.item_ids]
    encoder = RecommendationEncoder(ids, bundle.version, settings.clicks_topic)
    batcher = MicroBatcher(
        engine,
        item_rows={item_id: row for row, item_id in enumerate(ids) if row},
        encoder=encoder,
        limits=_limits(settings, encoder, layout, topics),
        only_latest=settings.publish == "latest",
    )
    note = commit_note(changelog_id)
    app = build_app(settings, note)
    delivery = build_delivery(settings, topics, note)
    options = StoreOptions(
        layout, changelog_id, delivery.append, delivery.take_over, delivery.end_markers, settings.state_cache_mb << 20
    )
    table = user_state_table(app, options)
    metrics = Metrics()
    pipeline = Pipeline(
        batcher,
        table.store,
        delivery,
        metrics,
        max_batch=settings.max_batch,
        max_wait_seconds=settings.max_wait_ms / 1000,
    )
    add_agent(app, settings, pipeline)
    health = HealthServer(metrics, lambda: is_ready(app), lambda: _refresh(app, metrics))
    return Parts(app, settings.clicks_topic, bundle, table, delivery, pipeline, health, metrics)


def build_delivery(settings: Settings, found: Mapping[str, FoundTopic], note: str) -> Delivery[Any]:
    """How results become durable, by the guarantee that is set."""
    topics = Topics(settings.recommendations_topic, settings.dead_letter_topic, settings.changelog_topic)
    timeout_seconds = settings.broker_timeout_seconds + 5
    if settings.guarantee == "at_least_once":
        return AtLeastOnce(Publisher(settings.kafka_client(), _largest_batch(settings, found)), topics, timeout_seconds)
    limits = Limits(
        recommendation_partitions=found[topics.recommendations].partitions,
        dead_letter_partitions=found[topics.dead_letters].partitions,
        batch=_largest_batch(settings, found),
        dead_letter=found[topics.dead_letters].max_message_bytes,
    )
    group = Group(settings.app_id, settings.clicks_topic, note)
    return ExactlyOnce(settings.kafka_client(), topics, group, limits, timeout_seconds)


def _largest_batch(settings: Settings, topics: Mapping[str, FoundTopic]) -> int:
    """Bytes of a record batch that the topics of recommendations and of states both take."""
    return min(topics[name].max_message_bytes for name in (settings.recommendations_topic, settings.changelog_topic))


def _limits(
    settings: Settings, encoder: RecommendationEncoder, layout: StateLayout, topics: Mapping[str, FoundTopic]
) -> ClickLimits:
    """What a click may hold, so that Kafka takes the recommendation and the state that it leads to.

    Raises:
        SettingsError: the longest list, or a state, leaves no room for a user_id.
    """
    room = _largest_batch(settings, topics)
    needed = {
        "TOP_K": encoder.most_bytes(settings.top_k),
        "RECENT_ITEMS": layout.dtype.itemsize + _RECORD_BYTES,
    }
    for name, most in needed.items():
        if most > room // 2:
            raise SettingsError(
                f"STREAM_APP_{name}={getattr(settings, name.lower())} is not allowed here: with this model a record "
                f"may take {most:,} bytes without its user_id, more than half of the {room:,} that topics "
                f"{settings.recommendations_topic} and {settings.changelog_topic} take; lower it, or raise "
                "max.message.bytes of both"
            )
    return ClickLimits(settings.max_click_bytes, room - max(needed.values()))


def build_app(settings: Settings, note: str) -> faust.App:
    """The Faust app: consumer group, rebalancing, table recovery and commits with this note; batches for messages."""
    servers = [URL(f"kafka://{server}") for server in settings.broker.split(",")]
    folder = settings.state_dir.absolute() / settings.app_id
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SettingsError(
            f"STREAM_APP_STATE_DIR={settings.state_dir} can't be used ({error.strerror}); "
            "name a folder that this user can write to"
        ) from None
    app = faust.App(
        settings.app_id,
        broker=servers,
        broker_credentials=_credentials(settings),
        broker_session_timeout=settings.session_timeout_seconds,
        broker_heartbeat_interval=settings.session_timeout_seconds / 10,
        # Faust wants every request to be allowed more time than a session.
        broker_request_timeout=max(settings.broker_timeout_seconds, settings.session_timeout_seconds + 1),
        broker_commit_interval=1.0,
        broker_max_poll_records=settings.max_batch,
        consumer_metadata_max_age_ms=_METADATA_SECONDS * 1000,
        consumer_group_instance_id=settings.group_instance_id,
        canonical_url=_member_url(settings),
        datadir=str(folder),
        topic_partitions=settings.partitions,
        table_standby_replicas=settings.standby_replicas,
        topic_allow_declare=False,  # `stream-app topics` creates them; the worker's start verifies them
        topic_disable_leader=True,
        stream_recovery_delay=0.0,
        web_enabled=False,  # health.py answers; Faust's own health is always OK
        producer_acks=-1,
    )
    transport = RecordBatchTransport(app.conf.broker_consumer, app)
    transport.commit_note = note
    transport.commits = settings.guarantee == "at_least_once"
    app.transport = transport
    return app


def _member_url(settings: Settings) -> str:
    """What Faust's assignor tells members apart by, and what it knows one by that comes back under its name."""
    if settings.group_instance_id is None:
        return f"worker://member/{uuid.uuid4()}"
    return f"worker://named/{settings.group_instance_id}"


def add_agent(app: faust.App, settings: Settings, pipeline: Pipeline) -> None:
    """The agent: hands each batch to the pipeline, which acknowledges it."""
    topic = app.topic(settings.clicks_topic, schema=RecordBatchSchema(), partitions=settings.partitions, maxsize=_QUEUE)

    @app.agent(topic, name="recommend", supervisor_strategy=CrashingSupervisor)
    async def recommend(batches: Any) -> None:
        async for event in batches.noack().events():
            await pipeline.put(event)


def is_settled(app: faust.App) -> bool:
    """Whether states are restored, here, and every partition has a member, here or elsewhere in the group.

    Faust's assignor passes over a topic that Kafka does not tell of, as it may just after a restart: then there are
    members without partitions though partitions are without a member. A spare member of a full group is settled.
    """
    return bool(
        app.tables.actives_ready
        and not app.rebalancing
        and assigned_partitions(cast("PartitionAssignor", app.assignor).changelog_distribution)
        == app.conf.topic_partitions
    )


def is_ready(app: faust.App) -> bool:
    """Whether clicks flow: settled, and Kafka answers."""
    return is_settled(app) and cast("RecordBatchConsumer", app.consumer).is_in_touch()


def assigned_partitions(distribution: Mapping[str, Mapping[str, Collection[int]]]) -> int:
    """How many partitions of the changelog have a member: member → topic → its partitions."""
    return len({partition for topics in distribution.values() for held in topics.values() for partition in held})


def lag_of(app: faust.App) -> dict[int, int]:
    """Assigned partition → clicks in the log that no commit has passed; left out while Kafka hasn't told its end."""
    return cast("RecordBatchConsumer", app.consumer).lag() if is_settled(app) else {}


def standby_lag_of(app: faust.App) -> dict[int, int]:
    """Partition that another worker has and this one follows → records of the changelog that are not read yet."""
    return cast("RecordBatchConsumer", app.consumer).standby_lag() if is_settled(app) else {}


def _refresh(app: faust.App, metrics: Metrics) -> None:
    metrics.ready.set(is_ready(app))
    metrics.rebalances.set(app.rebalancing_count)
    metrics.deleted_unread.set(cast("RecordBatchConsumer", app.consumer).deleted_unread)
    for gauge, by_partition in ((metrics.lag, lag_of(app)), (metrics.standby_lag, standby_lag_of(app))):
        gauge.clear()
        for partition, records in by_partition.items():
            gauge.labels(partition).set(records)


def _credentials(settings: Settings) -> faust.types.auth.CredentialsT | None:
    context = settings.ssl_context()
    if settings.security_protocol.startswith("SASL"):
        return faust.SASLCredentials(
            username=settings.sasl_username,
            password=settings.sasl_password,
            mechanism=settings.sasl_mechanism,
            ssl_context=context,
        )
    return None if context is None else faust.SSLCredentials(context=context)
