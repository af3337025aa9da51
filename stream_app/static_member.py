"""A static member of a consumer group (KIP-345), who finds out that another has taken its name.

Kafka lets the newest worker with a name have it, and says so to the one before where a request carries the name. Of
aiokafka's requests only those that join do: heartbeats and commits of the older one are answered as if its session had
ended, whereupon it would join again, take the name back, and so on for ever. So it asks before it joins again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from aiokafka.errors import KafkaError
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.group import JoinGroupRequest
from aiokafka.protocol.types import Int16, Int32, Schema, String

_FENCED_INSTANCE_ID = 82


class FencedError(KafkaError):  # type: ignore[misc]
    """Another member has this one's name now."""


class _HeartbeatResponse3(Response):  # type: ignore[misc]
    API_KEY = 12
    API_VERSION = 3
    SCHEMA = Schema(("throttle_time_ms", Int32), ("error_code", Int16))


class _HeartbeatRequest3(RequestStruct):  # type: ignore[misc]
    API_KEY = 12
    API_VERSION = 3
    RESPONSE_TYPE = _HeartbeatResponse3
    SCHEMA = Schema(
        ("group", String("utf-8")),
        ("generation_id", Int32),
        ("member_id", String("utf-8")),
        ("group_instance_id", String("utf-8")),
    )


class _NamedHeartbeat(Request[_HeartbeatRequest3]):  # type: ignore[misc]
    """A heartbeat that carries the member's name; aiokafka's newest version, 1, does not."""

    API_KEY = 12

    def __init__(self, *fields: str | int) -> None:
        self._fields = fields

    def build(self, request_struct_class: type[_HeartbeatRequest3]) -> _HeartbeatRequest3:
        return request_struct_class(*self._fields)


class _Membership(NamedTuple):
    generation: int
    member_id: str


def end_when_fenced(coordinator: Any, on_fenced: Callable[[], None]) -> None:
    """Make aiokafka's coordinator of a static member call this, and join no more, once another has its name."""
    send = coordinator._send_req
    last: _Membership | None = None

    async def is_fenced(membership: _Membership) -> bool:
        heartbeat = _NamedHeartbeat(coordinator.group_id, *membership, coordinator._group_instance_id)
        return bool((await send(heartbeat)).error_code == _FENCED_INSTANCE_ID)

    async def send_unless_fenced(request: Any) -> Any:
        nonlocal last
        if not isinstance(request, JoinGroupRequest):
            return await send(request)
        fenced = last is not None and await is_fenced(last)
        response = None if fenced else await send(request)
        if response is None or response.error_code == _FENCED_INSTANCE_ID:
            on_fenced()
            raise FencedError
        if response.error_code == 0:
            last = _Membership(response.generation_id, response.member_id)
        return response

    coordinator._send_req = send_unless_fenced
