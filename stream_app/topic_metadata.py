"""What Kafka says of topics: their partitions, leaders and ids.

aiokafka asks for metadata in versions that know no topic ids (KIP-516), so the newer version is written down here, with
aiokafka's own types. Kafka before 3.1 answers the older one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import LeaderNotAvailableError, UnknownTopicOrPartitionError, for_code
from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.metadata import MetadataRequest_v5
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

_NOT_THERE = (UnknownTopicOrPartitionError.errno, LeaderNotAvailableError.errno)

#: The id of a topic where Kafka gives none.
NO_ID = bytes(16)


@dataclass(frozen=True, slots=True)
class TopicMetadata:
    name: str
    id: bytes
    """16 bytes that no other topic has, nor a later one of the same name; `NO_ID` before Kafka 3.1."""
    partitions: int
    has_leaders: bool
    """Whether every partition can be read and written."""


async def describe(admin: AIOKafkaAdminClient, names: Sequence[str]) -> dict[str, TopicMetadata]:
    """Those of the topics that exist, by name. Creates none, also where Kafka makes topics on demand.

    Raises:
        KafkaError: no answer, or this user may not see one of the topics.
    """
    answer = (await admin._send_request(_MetadataRequest(names))).to_object()
    there = [topic for topic in answer["topics"] if topic["error_code"] not in _NOT_THERE]
    for topic in there:
        if topic["error_code"]:
            raise for_code(topic["error_code"])(f"topic {topic['topic']}")
    return {
        topic["topic"]: TopicMetadata(
            topic["topic"],
            topic.get("topic_id", NO_ID),
            len(topic["partitions"]),
            all(partition["leader"] >= 0 for partition in topic["partitions"]),
        )
        for topic in there
    }


class _Uuid(AbstractType[bytes]):
    @classmethod
    def encode(cls, value: bytes) -> bytes:
        return value

    @classmethod
    def decode(cls, data: BytesIO) -> bytes:
        return data.read(16)


class _MetadataResponseV12(Response):
    API_KEY = 3
    API_VERSION = 12
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString()),
                ("port", Int32),
                ("rack", CompactString()),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString()),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("topic", CompactString()),
                ("topic_id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _MetadataRequestV12(RequestStruct):
    API_KEY = 3
    API_VERSION = 12
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _MetadataResponseV12
    SCHEMA = Schema(
        ("topics", CompactArray(("topic_id", _Uuid), ("topic", CompactString()), ("tags", TaggedFields))),
        ("allow_auto_topic_creation", Boolean),
        ("include_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class _MetadataRequest(Request[MetadataRequest_v5 | _MetadataRequestV12]):
    """Built in the newest of the two versions that the answering broker knows."""

    API_KEY = 3

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)

    def build(self, request_struct_class: type[MetadataRequest_v5 | _MetadataRequestV12]) -> Any:
        if request_struct_class is _MetadataRequestV12:
            return _MetadataRequestV12([(NO_ID, name, {}) for name in self._names], False, False, {})
        return MetadataRequest_v5(self._names, False)
