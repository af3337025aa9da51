"""One bucket of users: what their clicks alone give, by the model's parallel form, against what was published."""

from __future__ import annotations

import hashlib
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
from jaxtyping import Complex64, Float32
from torch import Tensor

from lrurec.bundle import Bundle
from lrurec.model import LRURec
from stream_app.verify.ledger import Entry
from stream_app.verify.report import Report
from stream_app.verify.stored_state import StoredState, read_state, source_offset_of

#: Tokens that one call of the parallel form gets.
_TOKENS = 16_384

#: Users whose scores are computed at once.
_USERS = 256

#: How far a stored state may be from the parallel form's, as a share of that one's size, by the bytes of its numbers:
#: rounding to float16 at each step adds up to about 1/(1 - |λ|) roundings of 2^-11.
_STATE_TOLERANCE = {2: 0.01, 4: 1e-4}

#: The same for scores, in standard deviations of a user's scores, beside the five decimals that are printed.
_SCORE_TOLERANCE = {2: 0.02, 4: 1e-4}
_PRINTED = 1e-5

_CLICK = struct.Struct("<Iq")


class Kind(IntEnum):
    """Of an entry in the ledger."""

    CLICK = 0
    STATE = 1
    RECOMMENDATION = 2
    POISON = 3
    LETTER = 4


def click_payload(row: int, timestamp_ms: int, event_id: str | None) -> bytes:
    return _CLICK.pack(row, timestamp_ms) + (b"" if event_id is None else b"\1" + event_id.encode())


def bytes_digest(key: bytes | None, value: bytes | None) -> bytes:
    """Equal for equal keys and values, None being no bytes at all."""
    parts = (b"\0" if part is None else b"\1" + struct.pack("<Q", len(part)) + part for part in (key, value))
    return hashlib.sha256(b"".join(parts)).digest()


@dataclass(frozen=True)
class Expectations:
    """What everything is held against."""

    bundle: Bundle
    clicks_topic: str
    clicks_topic_id: str
    committed: Mapping[int, int]
    """Partition → offset up to which the group has acknowledged the clicks."""
    top_k: int
    recent_items: int
    exclude_seen: bool
    every_click: bool
    """Whether the recommendations topic still holds one for each click."""
    from_the_beginning: bool
    """Whether the log of clicks still holds them all."""
    recommendations_kept: bool
    """Whether nothing was deleted from the beginning of the recommendations."""
    letters_kept: bool
    """Whether nothing was deleted from the beginning of the dead letters."""


class _Click(NamedTuple):
    offset: int
    row: int
    timestamp_ms: int
    event_id: str | None


@dataclass
class _User:
    """What was read of one user in one partition of clicks."""

    name: str
    clicks: list[_Click] = field(default_factory=list)
    newest_offset: int = -2
    newest_state: bytes | None = None
    """Of all states the one with the highest source_offset, whatever their order in the changelog."""
    last_offset: int = -2
    """source_offset of the last state in the changelog, the one that compaction keeps."""
    sources: dict[int, tuple[bytes, dict[str, Any]]] = field(default_factory=dict)
    """Offset of the click → digest of its recommendation, and its fields without the items."""
    last: dict[str, Any] | None = None
    """The recommendation of the latest click that has one."""
    numbers: dict[int, int] = field(default_factory=dict)
    """Offset of a click → how many clicks the user has up to it."""

    @cached_property
    def state(self) -> StoredState | None:
        return None if self.newest_state is None else read_state(self.newest_state)


def check_bucket(entries: Sequence[Entry], expected: Expectations, report: Report) -> None:
    """Count what these entries hold, and every difference from what was expected."""
    users: dict[tuple[int, bytes], _User] = {}
    letters: dict[bytes, list[bytes]] = defaultdict(list)
    poison: dict[bytes, bytes] = {}
    for entry in entries:
        if entry.kind == Kind.POISON:
            poison[entry.key] = entry.payload
        elif entry.kind == Kind.LETTER:
            letters[entry.key].append(entry.payload)
        else:
            _note(entry, users, expected, report)
    _check_letters(poison, letters, expected, report)
    _check_users(users, expected, report)


def _check_letters(
    poison: Mapping[bytes, bytes], letters: Mapping[bytes, list[bytes]], expected: Expectations, report: Report
) -> None:
    report.poison += len(poison)
    report.dead_letters += sum(len(found) for found in letters.values())
    for place, digest in poison.items():
        partition, offset = map(int, place.split(b"/"))
        missing = place not in letters and expected.letters_kept
        if missing and offset < expected.committed.get(partition, 0):
            report.fault("missing_dead_letters", f"the record at {_place(expected, partition, offset)} is no click")
        if any(found not in {digest, b""} for found in letters.get(place, ())):  # none: too large for its topic
            report.fault("wrong_dead_letters", f"other bytes than those at {_place(expected, partition, offset)}")
    for place in letters.keys() - poison.keys() if expected.from_the_beginning else ():
        report.fault("wrong_dead_letters", f"the record at {place.decode(errors='replace')} is a click, or not there")


def _place(expected: Expectations, partition: int, offset: int) -> str:
    return f"{expected.clicks_topic}/{partition}/{offset}"


# -- reading a bucket


def _note(entry: Entry, users: dict[tuple[int, bytes], _User], expected: Expectations, report: Report) -> None:
    if entry.kind == Kind.CLICK:
        row, timestamp_ms = _CLICK.unpack_from(entry.payload)
        event_id = entry.payload[_CLICK.size + 1 :].decode() if len(entry.payload) > _CLICK.size else None
        user = _user(users, entry.partition, entry.key)
        user.clicks.append(_Click(entry.offset, row, timestamp_ms, event_id))
        user.numbers[entry.offset] = len(user.clicks)
    elif entry.kind == Kind.STATE:
        _note_state(_user(users, entry.partition, entry.key), entry, report)
    else:
        _note_recommendation(entry, users, expected, report)


def _user(users: dict[tuple[int, bytes], _User], partition: int, key: bytes) -> _User:
    if (partition, key) not in users:
        users[partition, key] = _User(f"user {key.decode(errors='replace')[:64]!r} of partition {partition}")
    return users[partition, key]


def _note_state(user: _User, entry: Entry, report: Report) -> None:
    report.states += 1
    source_offset = source_offset_of(entry.payload)
    user.last_offset = -2 if source_offset is None else source_offset
    if source_offset is None:
        report.fault("wrong_states", f"{user.name}: the bytes at changelog offset {entry.offset} are no user state")
    elif source_offset >= user.newest_offset:
        user.newest_offset, user.newest_state = source_offset, entry.payload


def _note_recommendation(
    entry: Entry, users: dict[tuple[int, bytes], _User], expected: Expectations, report: Report
) -> None:
    report.recommendations += 1
    where = f"the recommendation at {entry.partition}/{entry.offset}"
    try:
        document = orjson.loads(entry.payload)
        source = document["source"]
        partition, offset, clicks = source["partition"], source["offset"], document["clicks"]
        del document["generated_at_ms"]
        ours = source["topic"] == expected.clicks_topic and document["user_id"].encode() == entry.key
        digest = hashlib.sha256(orjson.dumps(document, option=orjson.OPT_SORT_KEYS)).digest()
        if {type(partition), type(offset), type(clicks)} != {int}:
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        report.fault("wrong_recommendations", f"{where} does not keep to its schema")
        return
    if not ours:
        report.fault("wrong_recommendations", f"{where} has another user's key, or answers another topic")
        return
    user = _user(users, partition, entry.key)
    if offset in user.sources:
        report.repeated_recommendations += 1
        if user.sources[offset][0] != digest:
            report.fault(
                "conflicting_recommendations", f"{user.name}: two for the click at offset {offset}, the later {where}"
            )
    user.sources[offset] = digest, {name: document.get(name) for name in ("source", "clicks", "model_version")}
    if user.last is None or offset >= user.last["source"]["offset"]:
        user.last = document


# -- checking it


class _Question(NamedTuple):
    """What the model has to be asked: where a user is after so many clicks."""

    user: _User
    clicks: int
    about_state: bool
    about_list: bool


def _check_users(users: Mapping[tuple[int, bytes], _User], expected: Expectations, report: Report) -> None:
    questions: list[_Question] = []
    for (partition, _), user in users.items():
        report.users += 1
        report.clicks += len(user.clicks)
        report.overtaken_users += user.last_offset < user.newest_offset
        if _is_cut_off(user, expected):
            report.unverifiable_users += 1
            continue
        committed = sum(click.offset < expected.committed.get(partition, 0) for click in user.clicks)
        report.acknowledged_clicks += committed
        report.verified_users += bool(committed or user.newest_state or user.last)
        _check_presence(user, committed, expected, report)
        questions += _questions_of(user, committed, expected, report)
    for asked, states, encodings in _answers(questions, expected.bundle.model):
        _compare(asked, states, encodings, expected, report)


def _is_cut_off(user: _User, expected: Expectations) -> bool:
    """Whether the user has clicked before the log begins, so that nothing of him can be computed."""
    if expected.from_the_beginning:
        return False
    known = [(user.state.source_offset, user.state.clicks)] if user.state else []
    if user.last is not None:
        known.append((user.last["source"]["offset"], user.last["clicks"]))
    return any(user.numbers.get(offset, 0) < clicks for offset, clicks in known)


def _check_presence(user: _User, committed: int, expected: Expectations, report: Report) -> None:
    """Every recommendation answers a click and says which; every click that is looked up has one."""
    looked_up = user.clicks[:committed] if expected.every_click else user.clicks[max(0, committed - 1) : committed]
    answered = max(user.sources, default=-1)
    for click in looked_up if expected.recommendations_kept else ():
        if click.offset not in user.sources and (expected.every_click or answered < click.offset):
            report.fault("missing_recommendations", f"{user.name}: none for the click at offset {click.offset}")
    for offset, (_, fields) in user.sources.items():
        if (number := user.numbers.get(offset)) is None:
            report.fault("wrong_recommendations", f"{user.name}: one for offset {offset}, which holds no click of his")
        elif fault := _fault_of_fields(fields, user.clicks[number - 1], number, expected):
            report.fault("wrong_recommendations", f"{user.name}: {fault}")


def _questions_of(user: _User, committed: int, expected: Expectations, report: Report) -> Iterator[_Question]:
    """Faults that show without the model are counted at once."""
    of_state = of_list = None
    if user.newest_state is None:
        if committed:
            report.fault("missing_states", f"{user.name} has {committed} clicks and no state")
    elif user.state is None:
        report.fault("wrong_states", f"{user.name}: the bytes of its state are none of the documented format")
    elif fault := _fault_of_state(user, user.state, committed, expected):
        report.fault("wrong_states", f"{user.name}: {fault}")
    else:
        of_state = user.state.clicks
    if user.last is not None and (number := user.numbers.get(user.last["source"]["offset"])) is not None:
        of_list = number
    for clicks in {number for number in (of_state, of_list) if number is not None}:
        yield _Question(user, clicks, about_state=clicks == of_state, about_list=clicks == of_list)


def _fault_of_state(user: _User, state: StoredState, committed: int, expected: Expectations) -> str | None:
    """What of a state is wrong without a look at its hidden numbers."""
    number = user.numbers.get(state.source_offset)
    if number is None:
        return f"its state is of offset {state.source_offset}, which holds no click of his"
    if number < committed:
        return f"its state ends with click {number} of {committed} that are acknowledged"
    rows = [click.row for click in user.clicks[max(0, number - expected.recent_items) : number]]
    wanted = {
        "model": expected.bundle.version,
        "source_log": expected.clicks_topic_id,
        "clicks": number,
        "timestamp_ms": user.clicks[number - 1].timestamp_ms,
        "recent_items": rows,
    }
    found = {name: getattr(state, name) for name in wanted} | {"recent_items": state.recent_items.tolist()}
    wrong = [name for name in wanted if found[name] != wanted[name]]
    return f"its {wrong[0]} is {found[wrong[0]]}, and should be {wanted[wrong[0]]}" if wrong else None


def _fault_of_fields(fields: dict[str, Any], click: _Click, number: int, expected: Expectations) -> str | None:
    """What of a recommendation is wrong beside its items."""
    source = {
        "topic": expected.clicks_topic,
        "partition": fields["source"]["partition"],
        "offset": click.offset,
        "timestamp_ms": click.timestamp_ms,
    } | ({} if click.event_id is None else {"event_id": click.event_id})
    wanted = {"source": source, "clicks": number, "model_version": expected.bundle.version}
    wrong = [name for name in wanted if fields[name] != wanted[name]]
    return f"{wrong[0]} is {fields[wrong[0]]}, and should be {wanted[wrong[0]]}" if wrong else None


# -- asking the model


@torch.inference_mode()
def _answers(
    questions: Sequence[_Question], model: LRURec
) -> Iterator[tuple[list[_Question], Complex64[Tensor, "b l h"], Float32[Tensor, "b d"]]]:
    """Questions with the states and encodings of the parallel form, a batch at a time."""
    batch: list[_Question] = []
    for question in sorted(questions, key=lambda asked: asked.clicks):
        if batch and (len(batch) == _USERS or (len(batch) + 1) * question.clicks > _TOKENS):
            yield batch, *_replay(batch, model)
            batch = []
        batch.append(question)
    if batch:
        yield batch, *_replay(batch, model)


def _replay(batch: Sequence[_Question], model: LRURec) -> tuple[Tensor, Tensor]:
    """A history longer than `_TOKENS` comes alone and in pieces, each going on from the state before."""
    longest = max(question.clicks for question in batch)
    state, encoding = model.initial_state(len(batch)), torch.empty(0)
    for start in range(0, longest, _TOKENS):
        pieces = [
            torch.tensor([click.row for click in question.user.clicks[start : min(question.clicks, start + _TOKENS)]])
            for question in batch
        ]
        lengths = torch.tensor([len(piece) for piece in pieces])
        items = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        encodings, state = model.encode_from(state, items, lengths)
        encoding = encodings[torch.arange(len(batch)), lengths - 1]
    return state, encoding


def _compare(
    batch: Sequence[_Question], states: Tensor, encodings: Tensor, expected: Expectations, report: Report
) -> None:
    for question, hidden in zip(batch, states.numpy(), strict=True):
        state = question.user.state
        if question.about_state and state is not None and (fault := _fault_of_hidden(state, hidden, report)):
            report.fault("wrong_states", f"{question.user.name}: {fault}")
    lists = [place for place, question in enumerate(batch) if question.about_list]
    if lists:
        scores = expected.bundle.model.scores(encodings[lists]).double().numpy()
        for place, of_user in zip(lists, scores, strict=True):
            if fault := _fault_of_items(batch[place], of_user, expected, report):
                report.fault("wrong_recommendations", f"{batch[place].user.name}: {fault}")


def _fault_of_hidden(state: StoredState, hidden: np.ndarray, report: Report) -> str | None:
    found = state.hidden[:, 0] + 1j * state.hidden[:, 1]
    if found.shape != hidden.shape:
        return f"its hidden numbers are {found.shape}, and should be {hidden.shape}"
    size = np.linalg.norm(hidden, axis=1)
    error = float((np.linalg.norm(found - hidden, axis=1) / np.maximum(size, 1e-12)).max())
    report.worst_state_error = max(report.worst_state_error, error)
    if not error <= _STATE_TOLERANCE[state.hidden_bytes]:  # also for NaN
        return f"its hidden numbers are off by {error:.3g} of their size"
    return None


def _fault_of_items(asked: _Question, scores: np.ndarray, expected: Expectations, report: Report) -> str | None:
    """Whether a list is the best there is after these clicks, up to the tolerance on scores."""
    try:
        items = (asked.user.last or {})["items"]
        listed = expected.bundle.catalogue.rows([item["item_id"] for item in items])
        given = np.array([item["score"] for item in items], float)
    except (KeyError, TypeError, ValueError):
        return "its list does not keep to the schema"
    allowed = np.ones(len(scores), bool)
    allowed[0] = False
    if expected.exclude_seen:
        seen = asked.user.clicks[max(0, asked.clicks - expected.recent_items) : asked.clicks]
        allowed[[click.row for click in seen]] = False
    if len(listed) != min(expected.top_k, int(allowed.sum())) or len(set(listed.tolist())) != len(listed):
        return f"its list has {len(listed)} items, or one of them twice"
    if not allowed[listed].all():
        return "its list holds items that are unknown or were just seen"
    unit = float(scores.std()) or 1.0
    error = float(np.abs(scores[listed] - given).max(initial=0))
    report.worst_score_error = max(report.worst_score_error, error / unit)
    tolerance = _SCORE_TOLERANCE[asked.user.state.hidden_bytes if asked.user.state else 2] * unit + _PRINTED
    if not error <= tolerance or (np.diff(given) > 0).any():  # also for NaN
        return f"a score of its list is off by {error / unit:.3g} standard deviations, or not in order"
    allowed[listed] = False
    if scores[allowed].max(initial=-np.inf) > given.min(initial=np.inf) + tolerance:
        return "its list leaves out an item that scores higher"
    return None
