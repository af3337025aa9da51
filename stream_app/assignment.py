"""Which member of the group has which partitions: balanced, and where their states are on disk already.

Takes the place of Faust's own distribution (`faust.assignor.copartitioned_assignor`), which with standbys may search
for ever, may leave a member that joins without a partition, and knows nothing of what a restarted member has on its
disk. What it is told and how the answer is written down stay Faust's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from faust.assignor.client_assignment import ClientAssignment, CopartitionedAssignment
from faust.assignor.partition_assignor import PartitionAssignor


@dataclass
class Held:
    """Partitions of one member."""

    actives: set[int] = field(default_factory=set)
    standbys: set[int] = field(default_factory=set)


def distribute(before: Mapping[str, Held], partitions: int, replicas: int) -> dict[str, Held]:
    """Each partition to one active and to min(replicas, members - 1) standby members. Pure.

    Numbers of active partitions differ by one at most. Whoever has a partition keeps it as far as that allows; one that
    is free goes to a member that had it as a standby or, fresh from a restart, has it on its disk. Standbys stay
    likewise, and a member that had the partition as its active one comes first.
    """
    members = sorted(before)
    after = {member: Held() for member in members}
    _keep_actives(before, after, partitions)
    _place_actives(before, after, partitions)
    _place_standbys(before, after, partitions, min(replicas, len(members) - 1))
    return after


def _has_room(after: Mapping[str, Held], member: str, partitions: int) -> bool:
    """Whether one more active partition leaves the members balanced: `extra` of them have one more than `least`."""
    least, extra = divmod(partitions, len(after))
    count = len(after[member].actives)
    return count < least or (count == least and sum(len(held.actives) > least for held in after.values()) < extra)


def _keep_actives(before: Mapping[str, Held], after: Mapping[str, Held], partitions: int) -> None:
    """What a member gives up is what others are prepared for, if anything is."""
    taken: set[int] = set()
    for member in sorted(before, key=lambda name: -len(before[name].actives)):
        prepared = {p for other, held in before.items() if other != member for p in held.standbys}
        for partition in sorted(before[member].actives, key=lambda p: (p in prepared, p)):
            if 0 <= partition < partitions and partition not in taken and _has_room(after, member, partitions):
                after[member].actives.add(partition)
                taken.add(partition)


def _place_actives(before: Mapping[str, Held], after: Mapping[str, Held], partitions: int) -> None:
    taken = {partition for held in after.values() for partition in held.actives}
    prepared = {p: {member for member, held in before.items() if p in held.standbys} for p in range(partitions)}
    for partition in sorted(set(range(partitions)) - taken, key=lambda p: (not prepared[p], len(prepared[p]), p)):
        roomy = [member for member in after if _has_room(after, member, partitions)]
        best = min(roomy, key=lambda name: (name not in prepared[partition], len(after[name].actives), name))
        after[best].actives.add(partition)


def _place_standbys(before: Mapping[str, Held], after: Mapping[str, Held], partitions: int, replicas: int) -> None:
    fair = -(-partitions * replicas // max(1, len(after)))
    for partition in range(partitions):

        def worth(member: str, partition: int = partition) -> tuple[bool, int, int, str]:
            count, held = len(after[member].standbys), before[member]
            distance = 0 if partition in held.actives else 1 if partition in held.standbys else 2
            return count >= fair, distance, count, member

        others = [member for member in after if partition not in after[member].actives]
        for member in sorted(others, key=worth)[:replicas]:
            after[member].standbys.add(partition)


class Assignor(PartitionAssignor):
    """Faust's assignor with `distribute` for the distribution."""

    def claim(self, topics: Collection[str], partitions: Iterable[int]) -> None:
        """Say when joining that these partitions of the topics are on this worker's disk."""
        numbers = sorted(partitions)
        self._assignment = ClientAssignment(actives={}, standbys=dict.fromkeys(topics, numbers))

    def _perform_assignment(self, cluster: Any, member_metadata: Mapping[str, Any]) -> Any:
        clients = {member: self._get_client_metadata(metadata) for member, metadata in member_metadata.items()}
        self._update_member_urls(clients)
        assignments = {member: ClientAssignment(actives={}, standbys={}) for member in clients}
        groups = _copartitioned(
            cluster, {member: metadata.subscription for member, metadata in member_metadata.items()}
        )
        for (partitions, members), topics in groups.items():
            before = {member: _held(clients[member].assignment.copartitioned_assignment(topics)) for member in members}
            for member, held in distribute(before, partitions, self.replicas).items():
                assignments[member].add_copartitioned_assignment(
                    CopartitionedAssignment(held.actives, held.standbys, topics)
                )
        numbers = {topic: number for number, topics in enumerate(groups.values()) for topic in topics}
        return self._protocol_assignments(
            assignments,
            self._get_changelog_distribution(assignments),
            self._get_external_topic_distribution(assignments),
            numbers,
        )


def _held(assignment: CopartitionedAssignment) -> Held:
    return Held(set(assignment.actives), set(assignment.standbys))


def _copartitioned(
    cluster: Any, subscriptions: Mapping[str, Collection[str]]
) -> dict[tuple[int, frozenset[str]], set[str]]:
    """(partitions, subscribed members) → topics; without those that Kafka does not tell of."""
    groups: dict[tuple[int, frozenset[str]], set[str]] = {}
    for topic in sorted({topic for topics in subscriptions.values() for topic in topics}):
        members = frozenset(member for member, topics in subscriptions.items() if topic in topics)
        if partitions := len(cluster.partitions_for_topic(topic) or ()):
            groups.setdefault((partitions, members), set()).add(topic)
    return groups
