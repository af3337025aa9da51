"""The clothing shop whose real clicks the demo replays. Source and licence are in `eshop/`."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import NamedTuple

from lrurec.interactions import Interactions, read_interactions
from stream_app.dev.click_log import interleave

CLICKS_FILE = Path(__file__).with_name("eshop") / "clicks.csv.gz"
_ITEMS_FILE = CLICKS_FILE.with_name("items.csv")
_TRAINED_SHARE = 0.8
_SHOPPERS_AT_A_TIME = 25  # at 20 clicks/s, each clicks about every second: often enough to follow one


class ShopItem(NamedTuple):
    title: str
    price_usd: str


class ShopClick(NamedTuple):
    user_id: str
    item_id: str
    is_last: bool
    """Whether the session ends with it."""


@dataclass(frozen=True)
class Shop:
    """Sessions in the order of their days: the first 80% to learn from, the others held out."""

    training: Interactions
    held_out: Interactions
    items: dict[str, ShopItem]

    @classmethod
    def load(cls, clicks: Path = CLICKS_FILE, items: Path = _ITEMS_FILE) -> Shop:
        sessions = read_interactions(clicks)
        first_held_out = int(len(sessions.user_ids) * _TRAINED_SHARE)
        with items.open(encoding="utf-8", newline="") as file:
            known = {row["item_id"]: ShopItem(row["title"], row["price_usd"]) for row in csv.DictReader(file)}
        return cls(sessions.take(slice(None, first_held_out)), sessions.take(slice(first_held_out, None)), known)

    def title(self, item_id: str) -> str:
        return self.items[item_id].title if item_id in self.items else item_id

    @cached_property
    def popular(self) -> tuple[str, ...]:
        """Every item that was clicked in training, most clicks first."""
        rows = Counter(self.training.histories.items.tolist())
        ids = self.training.catalogue.item_ids
        return tuple(ids[row - 1] for row, _ in rows.most_common())

    def write_training_log(self, path: Path) -> None:
        """The training sessions as a CSV that `lrurec train` reads."""
        ids, histories = self.training.catalogue.item_ids, self.training.histories
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["user_id", "item_id", "position"])
            for user, user_id in enumerate(self.training.user_ids):
                rows.writerows((user_id, ids[row - 1], place) for place, row in enumerate(histories[user].tolist()))

    def held_out_clicks(self) -> Iterator[ShopClick]:
        """The held-out sessions without end, many shoppers clicking in turn.

        Each further pass has user ids of its own (`s20001.2` in the second), so that no session is repeated as the
        continuation of itself.
        """
        lengths = dict(zip(self.held_out.user_ids, self.held_out.histories.lengths.tolist(), strict=True))
        for number in count(1):
            left = dict(lengths)
            suffix = "" if number == 1 else f".{number}"
            for user_id, item_id in interleave(self.held_out, active=_SHOPPERS_AT_A_TIME, seed=number):
                left[user_id] -= 1
                yield ShopClick(user_id + suffix, item_id, left[user_id] == 0)
