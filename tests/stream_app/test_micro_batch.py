"""Records and states in, everything to write out: each click once, each user alone, however the records are cut."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from aiokafka.structs import ConsumerRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec.bundle import make_bundle
from lrurec.catalogue import Catalogue
from lrurec.config import LRURecConfig
from lrurec.model import LRURec
from lrurec.serving import CompiledEngine, state_layout
from lrurec.user_state import UserStateError
from stream_app.messages import ClickLimits
from stream_app.micro_batch import MicroBatcher
from stream_app.recommendations import RecommendationEncoder

NOW_MS = 1_700_000_000_000
ITEMS = [f"i{row}" for row in range(1, 13)]


@pytest.fixture(scope="module")
def bundle():
    torch.manual_seed(3)
    model = LRURec(LRURecConfig(num_items=12, hidden_units=8, num_blocks=2))
    with torch.no_grad():
        model.item_embedding.weight.mul_(30)
    return make_bundle(model.config, model.state_dict(), Catalogue(ITEMS))


@pytest.fixture(scope="module")
def engine(bundle):
    return CompiledEngine(bundle, state_layout(bundle, recent_capacity=4), top_k=3, exclude_seen=True, max_batch=64)


@pytest.fixture(scope="module", params=[False, True], ids=["each", "latest"])
def any_batcher(request, bundle, engine):
    return batcher_of(bundle, engine, only_latest=request.param)


@pytest.fixture(scope="module")
def batcher(bundle, engine):
    return batcher_of(bundle, engine)


def batcher_of(bundle, engine, *, only_latest=False):
    rows = {item_id: row for row, item_id in enumerate(ITEMS, start=1)}
    encoder = RecommendationEncoder(["", *ITEMS], bundle.version, "clicks")
    return MicroBatcher(engine, rows, encoder, ClickLimits(200, 400), only_latest)


class World:
    """What a worker leaves behind: states by partition and user, and what it published."""

    def __init__(self, batcher):
        self.batcher = batcher
        self.states = defaultdict(dict)
        self.recommendations = []
        self.dead_letters = []
        self.applied = self.skipped = self.unknown_items = 0

    def run(self, *batches):
        arrived = self.batcher.decode(batches)
        rows = [row for partition, keys in arrived.users for row in self.load(partition, keys)]
        outbox, answers = self.batcher.advance(arrived, self.batcher.unpack(rows))
        if answers is not None:
            outbox.recommendations = self.batcher.write(answers, NOW_MS)
        for partition, rows in outbox.states.items():
            self.states[partition].update(rows)
        for partition, published in outbox.recommendations.items():
            self.recommendations += published
            assert {json.loads(value)["source"]["partition"] for _, value in published} == {partition}
        for partition, letters in outbox.dead_letters.items():
            self.dead_letters += letters
            assert {dict(letter.headers)["__streams.errors.partition"] for letter in letters} == {b"%d" % partition}
        self.applied += outbox.applied
        self.skipped += outbox.skipped
        self.unknown_items += outbox.unknown_items
        return outbox

    def load(self, partition, keys):
        assert len(set(keys)) == len(keys), "a user is loaded once"
        return [self.states[partition].get(key) for key in keys]

    def state(self, partition, key):
        return self.batcher.engine.layout.unpack([self.states[partition].get(key)])[0]

    def sources(self):
        """(partition, offset) of every recommendation, in the order of publishing."""
        documents = [json.loads(value) for _, value in self.recommendations]
        return [(document["source"]["partition"], document["source"]["offset"]) for document in documents]


def click(offset, user="u", item="i1", partition=0, **fields):
    value = json.dumps({"user_id": user, "item_id": item, "timestamp_ms": 1000 + offset} | fields).encode()
    return record(offset, user.encode(), value, partition)


def record(offset, key, value, partition=0):
    return ConsumerRecord("clicks", partition, offset, 0, 0, key, value, None, -1, -1, ())


# -- one click


def test_a_click_gives_its_user_a_state_and_a_recommendation(batcher, bundle):
    world = World(batcher)
    world.run([click(991, "s17", "i5", partition=3, event_id="e")])
    [(key, value)] = world.recommendations
    document = json.loads(value)
    assert key == b"s17"
    assert len(document.pop("items")) == 3
    assert document == {
        "user_id": "s17",
        "model_version": bundle.version,
        "clicks": 1,
        "source": {"topic": "clicks", "partition": 3, "offset": 991, "event_id": "e", "timestamp_ms": 1991},
        "generated_at_ms": NOW_MS,
    }
    state = world.state(3, b"s17")
    assert (state["source_offset"], state["clicks"], state["timestamp_ms"]) == (991, 1, 1991)
    assert state["recent_items"].tolist() == [5, 0, 0, 0]
    assert (world.applied, world.skipped, world.unknown_items) == (1, 0, 0)


def test_nothing_leads_to_nothing(any_batcher):
    outbox = World(any_batcher).run([], [])
    assert outbox == World(any_batcher).run()
    assert (outbox.recommendations, outbox.dead_letters, outbox.states) == ({}, {}, {})


def test_a_users_clicks_in_one_micro_batch_build_on_each_other(batcher):
    together, apart = World(batcher), World(batcher)
    clicks = [click(offset, item=f"i{1 + offset % 7}") for offset in range(50)]
    together.run(clicks)
    for each in clicks:
        apart.run([each])
    assert together.recommendations == apart.recommendations
    assert together.states == apart.states
    assert [json.loads(value)["clicks"] for _, value in together.recommendations] == list(range(1, 51))


# -- the fence


def test_a_click_at_or_before_the_last_applied_offset_is_skipped(any_batcher):
    world = World(any_batcher)
    world.run([click(5), click(7)])
    before, published = dict(world.states[0]), len(world.recommendations)
    world.run([click(5), click(6), click(7)])
    assert world.states[0] == before
    assert len(world.recommendations) == published
    assert (world.applied, world.skipped) == (2, 3)


def test_only_what_is_new_of_a_repeated_batch_is_applied(batcher):
    world = World(batcher)
    world.run([click(0, item="i1"), click(1, item="i2")])
    world.run([click(0, item="i1"), click(1, item="i2"), click(2, item="i3")])
    once = World(batcher)
    once.run([click(0, item="i1"), click(1, item="i2"), click(2, item="i3")])
    assert world.states == once.states
    assert world.sources() == [(0, 0), (0, 1), (0, 2)]


def test_a_batch_delivered_twice_into_one_micro_batch_counts_once(any_batcher):
    batch = [click(0), click(1, "v"), click(2)]
    world, once = World(any_batcher), World(any_batcher)
    world.run(batch, batch)
    once.run(batch)
    assert world.states == once.states
    assert world.recommendations == once.recommendations
    assert (world.applied, world.skipped) == (3, 3)


def test_the_fence_is_each_users_own(batcher):
    world = World(batcher)
    world.run([click(9, "u")])
    world.run([click(3, "v"), click(4, "u")])
    assert world.sources() == [(0, 9), (0, 3)]


# -- users, partitions, neighbours


def test_one_user_id_in_two_partitions_has_two_states(any_batcher):
    world = World(any_batcher)
    world.run([click(0, item="i1", partition=0)], [click(0, item="i2", partition=1)])
    assert world.state(0, b"u")["recent_items"][0] == 1
    assert world.state(1, b"u")["recent_items"][0] == 2
    assert world.state(0, b"u")["clicks"] == world.state(1, b"u")["clicks"] == 1
    assert sorted(world.sources()) == [(0, 0), (1, 0)]


def test_several_batches_of_one_partition_go_on_from_each_other(batcher):
    cut, whole = World(batcher), World(batcher)
    clicks = [click(offset, "uv"[offset % 2], f"i{1 + offset}") for offset in range(10)]
    cut.run(clicks[:3], clicks[3:4], clicks[4:])
    whole.run(clicks)
    assert cut.states == whole.states
    assert cut.recommendations == whole.recommendations


def test_unknown_items_advance_nothing_and_are_counted(any_batcher):
    world = World(any_batcher)
    world.run([click(0, "u", "i1"), click(1, "u", "never heard of"), click(2, "v", "neither")])
    assert world.unknown_items == 2
    assert world.state(0, b"u")["source_offset"] == 0
    assert b"v" not in world.states[0]
    assert world.sources() == [(0, 0)]
    assert world.dead_letters == []


def test_poison_disturbs_no_neighbour(any_batcher):
    poison = [record(1, b"u", b"{"), record(3, None, b'{"user_id":"u","item_id":"i1","timestamp_ms":1}')]
    with_poison, without = World(any_batcher), World(any_batcher)
    with_poison.run([click(0), poison[0], click(2, "v"), poison[1], click(4)])
    without.run([click(0), click(2, "v"), click(4)])
    assert with_poison.states == without.states
    assert with_poison.recommendations == without.recommendations
    assert [letter.value for letter in with_poison.dead_letters] == [letter.value for letter in poison]


def test_poison_alone_asks_for_no_state(batcher):
    arrived = batcher.decode([[record(0, b"u", b"{")]])
    assert arrived.users == []
    outbox, answers = batcher.advance(arrived, batcher.unpack([]))
    assert len(outbox.dead_letters) == 1
    assert outbox.states == {}
    assert answers is None


def test_only_users_whose_state_went_on_are_written(batcher):
    world = World(batcher)
    world.run([click(0, "u"), click(1, "v")])
    outbox = world.run([click(0, "u"), click(2, "v"), click(3, "w", "unknown")])
    assert [key for key, _ in outbox.states[0]] == [b"v"]


def test_a_stored_state_of_another_model_is_refused(batcher):
    world = World(batcher)
    world.run([click(0)])
    stored = world.states[0][b"u"]
    world.states[0][b"u"] = stored[:8] + bytes(8) + stored[16:]
    with pytest.raises(UserStateError, match=f"model {'00' * 8}"):
        world.run([click(1)])


# -- however the records are cut


@st.composite
def logs(draw):
    """Records of two partitions: clicks of four users, unknown items, poison; with gaps between the offsets."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    log = {0: [], 1: []}
    for partition, records in log.items():
        for offset in np.cumsum(rng.integers(1, 4, draw(st.integers(0, 40)))).tolist():
            user, item = "abcd"[rng.integers(4)], f"i{rng.integers(1, 15)}"
            if rng.random() < 0.1:
                records.append(record(offset, user.encode(), b"poison", partition))
            else:
                records.append(click(offset, user, item, partition, event_id=f"{partition}-{offset}"))
    return log


def deliver(data, log, world, *, rewinding=False):
    """The log in drawn micro-batches; with `rewinding`, now and then from an earlier record again, as after a crash."""
    place = {0: 0, 1: 0}
    rewinds = data.draw(st.integers(0, 3)) if rewinding else 0
    while any(place[partition] < len(log[partition]) for partition in log):
        batches = []
        for partition in data.draw(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=4)):
            start, stop = place[partition], place[partition] + data.draw(st.integers(0, 25))
            batches.append(log[partition][start:stop])
            place[partition] = min(stop, len(log[partition]))
        world.run(*batches)
        if rewinds and data.draw(st.booleans()):
            rewinds -= 1
            partition = data.draw(st.sampled_from([0, 1]))
            place[partition] = data.draw(st.integers(0, place[partition]))


@given(log=logs(), data=st.data())
@settings(max_examples=60)
def test_results_do_not_depend_on_how_records_are_cut_into_micro_batches(batcher, log, data):
    whole, cut = World(batcher), World(batcher)
    whole.run(*log.values())
    deliver(data, log, cut)
    assert cut.states == whole.states
    assert sorted(cut.recommendations) == sorted(whole.recommendations)
    assert sorted(cut.sources()) == sorted(set(cut.sources()))
    for partition in (0, 1):
        assert [o for p, o in cut.sources() if p == partition] == sorted(
            o for p, o in whole.sources() if p == partition
        )
    assert len(cut.dead_letters) == len(whole.dead_letters)
    counts = [(world.applied, world.skipped, world.unknown_items) for world in (cut, whole)]
    assert counts[0] == counts[1]


@given(log=logs(), data=st.data())
@settings(max_examples=60)
def test_delivering_records_again_changes_no_state_and_publishes_nothing_twice(batcher, log, data):
    whole, again = World(batcher), World(batcher)
    whole.run(*log.values())
    deliver(data, log, again, rewinding=True)
    assert again.states == whole.states
    assert sorted(again.recommendations) == sorted(whole.recommendations)


@given(log=logs(), data=st.data())
@settings(max_examples=40)
def test_a_crash_before_the_states_are_kept_repeats_the_same_recommendations(batcher, log, data):
    whole, crashed = World(batcher), World(batcher)
    whole.run(*log.values())
    lost = {partition: records[: data.draw(st.integers(0, len(records)))] for partition, records in log.items()}
    crashed.run(*lost.values())
    published = len(crashed.recommendations)
    crashed.states.clear()
    crashed.run(*log.values())
    assert crashed.states == whole.states
    assert set(crashed.recommendations) == set(whole.recommendations)
    assert len(crashed.recommendations) == len(whole.recommendations) + published


@given(log=logs())
@settings(max_examples=40)
def test_latest_publishes_each_users_last_click_of_the_micro_batch_alone(bundle, engine, log):
    each, latest = World(batcher_of(bundle, engine)), World(batcher_of(bundle, engine, only_latest=True))
    for world in (each, latest):
        world.run(*log.values())
    last = {}
    for (partition, _), (key, value) in zip(each.sources(), each.recommendations, strict=True):
        last[partition, key] = value
    assert sorted(value for _, value in latest.recommendations) == sorted(last.values())
    assert latest.states == each.states
    assert latest.applied == each.applied
