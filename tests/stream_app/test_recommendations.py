"""What is published keeps to its schema, says what was given, and is as large as clicks were taken for."""

from __future__ import annotations

import json

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import schemas
from stream_app.recommendations import Lists, RecommendationEncoder

SCHEMA = Draft202012Validator(schemas.load("recommendation.schema.json"))
IDS = ["", "A", "B", "Ä", 'quoted "\\\n', "long" * 30]
ENCODER = RecommendationEncoder(IDS, "5f0c1d9e2ab34c77", "clicks")
texts = st.text(st.characters(exclude_categories=["Cs"]))
int64s = st.integers(-(2**63), 2**63 - 1)
counts = st.integers(0, 2**63 - 1)
partitions = st.integers(0, 2**31 - 1)
logits = st.floats(-(2.0**33), 2.0**33, width=32) | st.floats(-1, 1, width=32)


def lists_of(rows):
    """Columns of rows (user, items, scores, clicks, partition, offset, timestamp_ms, event_id)."""
    user, items, scores, clicks, partition, offset, timestamp_ms, event_id = zip(*rows, strict=True)
    return Lists(
        [each.encode() for each in user],
        np.array(items, np.int32).reshape(len(rows), -1),
        np.array(scores, np.float32).reshape(len(rows), -1),
        *(np.array(column, np.int64) for column in (clicks, partition, offset, timestamp_ms)),
        event_id,
    )


def one(user="u", items=(1,), scores=(0.5,), clicks=1, partition=0, offset=1, timestamp_ms=2, event_id=None):
    return lists_of([(user, items, scores, clicks, partition, offset, timestamp_ms, event_id)])


@st.composite
def any_lists(draw):
    k = draw(st.integers(1, 5))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        items = draw(st.permutations(range(1, len(IDS))))[: draw(st.integers(0, k))]
        padded = [*items, *[0] * (k - len(items))]
        values = [draw(logits) if item else -np.inf for item in padded]
        fields = draw(texts.filter(bool)), padded, values, draw(st.integers(1, 2**63 - 1))
        rows.append((*fields, draw(partitions), draw(counts), draw(int64s), draw(st.none() | texts)))
    return lists_of(rows)


@given(any_lists(), texts.filter(bool), st.integers(0, 2**62))
@settings(deadline=None)
def test_recommendations_keep_to_their_schema_and_say_what_was_given(lists, topic, now_ms):
    values = RecommendationEncoder(IDS, "5f0c1d9e2ab34c77", topic).encode(lists, now_ms)
    assert len(values) == len(lists.user)
    for row, value in enumerate(values):
        document = json.loads(value)
        SCHEMA.validate(document)
        source = {"topic": topic, "partition": int(lists.partition[row]), "offset": int(lists.offset[row])}
        source |= {} if lists.event_id[row] is None else {"event_id": lists.event_id[row]}
        items = [item for item in lists.items[row].tolist() if item]
        scores = np.round(lists.scores[row].astype(np.float64), 5).tolist()[: len(items)]
        assert document == {
            "user_id": lists.user[row].decode(),
            "items": [{"item_id": IDS[item], "score": score} for item, score in zip(items, scores, strict=True)],
            "model_version": "5f0c1d9e2ab34c77",
            "clicks": int(lists.clicks[row]),
            "source": source | {"timestamp_ms": int(lists.timestamp_ms[row])},
            "generated_at_ms": now_ms,
        }
        assert orjson.loads(value) == document


@given(any_lists())
@settings(deadline=None)
def test_lists_are_written_alike_alone_and_together(lists):
    together = ENCODER.encode(lists, 9)
    for row, value in enumerate(together):
        alone = Lists(*(column[row : row + 1] for column in lists))
        assert ENCODER.encode(alone, 9) == [value]


@given(st.lists(logits, min_size=2, max_size=5))
@settings(deadline=None)
def test_scores_are_near_keep_their_order_and_print_short(scores):
    scores.sort(reverse=True)
    [value] = ENCODER.encode(one(items=range(1, len(scores) + 1), scores=scores), 9)
    texts = [part.split(b"}")[0].decode() for part in value.split(b'"score":')[1:]]
    printed = list(map(float, texts))
    assert printed == sorted(printed, reverse=True)
    for score, text, number in zip(scores, texts, printed, strict=True):
        assert abs(number - score) <= 0.5000001e-5
        whole, _, decimals = text.partition(".")
        assert whole.lstrip("-").isdecimal()
        assert 1 <= len(decimals) <= 5
        assert decimals == "0" or not decimals.endswith("0")


@pytest.mark.parametrize("score", [1e10, -3e38, 123456789123.0])
def test_a_score_too_large_for_five_decimals_is_printed_all_the_same(score):
    rows = [("ü", [3, 0], [value, -np.inf], 7, 3, 5, -2, event) for value in (score, 0.123456) for event in ("e", None)]
    first, second, *usual = ENCODER.encode(lists_of(rows), 9)
    assert usual == ENCODER.encode(lists_of(rows[2:]), 9)
    for large, small in zip((first, second), usual, strict=True):
        items = [{"item_id": "Ä", "score": float(np.float32(score))}]
        assert json.loads(large) == json.loads(small) | {"items": items}
        assert list(json.loads(large)) == list(json.loads(small))


wide = texts.filter(bool).filter(lambda text: len(text) <= 40)


@given(
    st.lists(wide, min_size=1, max_size=6, unique=True), wide, st.none() | wide, st.text("abc", max_size=20), st.data()
)
@settings(deadline=None)
def test_a_recommendation_is_never_larger_than_its_click_and_list_were_taken_for(items, user, event_id, topic, data):
    encoder = RecommendationEncoder(["", *items], "5f0c1d9e2ab34c77", topic)
    rows = data.draw(st.lists(st.sampled_from(range(1, len(items) + 1)), unique=True, min_size=1))
    scores = data.draw(st.lists(logits | st.floats(width=32), min_size=len(rows), max_size=len(rows)))
    largest = 2**63 - 1
    lists = one(user, rows, scores, largest, 2**31 - 1, largest, -largest - 1, event_id)
    [value] = encoder.encode(lists, largest)
    ids = len(orjson.dumps(user)) + len(
        orjson.dumps(event_id)
    )  # what `ClickLimits.max_id_bytes` counts, without the key
    assert len(value) <= encoder.most_bytes(len(rows)) + ids


def test_a_recommendation_holds_no_field_that_its_schema_does_not_know():
    [value] = ENCODER.encode(one(event_id="e"), 9)
    document = json.loads(value)
    assert list(document) == list(SCHEMA.schema["properties"])
    assert list(document["source"]) == list(SCHEMA.schema["properties"]["source"]["properties"])
    assert list(document["items"][0]) == list(SCHEMA.schema["properties"]["items"]["items"]["properties"])


def test_a_list_ends_where_the_catalogue_has_no_more():
    [value] = ENCODER.encode(one(items=[2, 0, 0], scores=[2.5, -np.inf, -np.inf]), 9)
    assert json.loads(value)["items"] == [{"item_id": "B", "score": 2.5}]


def test_the_same_recommendation_later_differs_in_its_time_alone():
    first, again = (json.loads(ENCODER.encode(one(), now_ms)[0]) for now_ms in (9, 10))
    assert first.pop("generated_at_ms") != again.pop("generated_at_ms")
    assert first == again
