"""The whole evaluation: a bundle beside the baselines, with intervals, groups of users and what the lists show."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from lrurec.bundle import Bundle
from lrurec.errors import InteractionsError
from lrurec.evaluation.baselines import lists_of_baselines
from lrurec.evaluation.bootstrap import LEVEL, RESAMPLES, SEED, Intervals, intervals, intervals_of_difference
from lrurec.evaluation.exposure import exposure_to_json
from lrurec.evaluation.metrics import Metrics, Ranks, metrics_of
from lrurec.evaluation.protocols import LeaveOneOut, Protocol
from lrurec.evaluation.ranking import lists_by_model, ranks_in
from lrurec.evaluation.strata import Stratum, by_history_length, by_popularity
from lrurec.interactions import Interactions

MODEL: Final = "model"
"""Its name beside those of the baselines."""

_LEAVE_ONE_OUT: Final = LeaveOneOut()


class Group(NamedTuple):
    """The users of a stratum, and the metrics of the model and the baselines for them."""

    users: int
    metrics: Mapping[str, Metrics]

    def to_json(self) -> dict[str, Any]:
        return {"users": self.users, **{name: metrics.to_json() for name, metrics in self.metrics.items()}}


class Difference(NamedTuple):
    """The model's metrics minus those of the baseline with the best NDCG@10, for the same users."""

    baseline: str
    metrics: Metrics
    intervals: Intervals

    def to_json(self) -> dict[str, Any]:
        return {"baseline": self.baseline, **self.metrics.to_json(), "intervals": self.intervals.to_json()}


class Evaluation(NamedTuple):
    """Figures by name: the model's under `MODEL`, the baselines' under theirs."""

    users: int
    unknown_answers: int
    """Users whose answer the bundle doesn't know: missed by everyone."""

    protocol: Mapping[str, Any]
    """Its name and, of a time split, the cut and whether the bundle is known to have been trained before it."""

    metrics: Mapping[str, Metrics]
    intervals: Mapping[str, Intervals]
    difference: Difference
    by_history_length: Mapping[str, Group]
    by_popularity: Mapping[str, Group]
    exposure: Mapping[str, Mapping[str, float]]

    @property
    def model(self) -> Metrics:
        return self.metrics[MODEL]

    @property
    def baselines(self) -> dict[str, Metrics]:
        return {name: metrics for name, metrics in self.metrics.items() if name != MODEL}

    @property
    def popular(self) -> Metrics:
        """Of recommending to everyone the items with the most clicks in the same histories."""
        return self.metrics["popular"]

    def to_json(self) -> dict[str, Any]:
        return {
            "users": self.users,
            **self.model.to_json(),
            "baselines": {name: metrics.to_json() for name, metrics in self.baselines.items()},
            **self.protocol,
            "unknown_answers": self.unknown_answers,
            "bootstrap": {"resamples": RESAMPLES, "level": LEVEL, "seed": SEED},
            "intervals": {name: each.to_json() for name, each in self.intervals.items()},
            "model_minus_best_baseline": self.difference.to_json(),
            "by_history_length": {name: group.to_json() for name, group in self.by_history_length.items()},
            "by_popularity": {name: group.to_json() for name, group in self.by_popularity.items()},
            "exposure": {name: dict(each) for name, each in self.exposure.items()},
        }


def evaluate(bundle: Bundle, interactions: Interactions, protocol: Protocol = _LEAVE_ONE_OUT) -> Evaluation:
    """Every answer ranked among all items but those of the input window: by the model and by the baselines.

    The window is the last `config.max_len` clicks, as in training and in the paper. Items that the bundle doesn't know
    are skipped in a history; as an answer they count as missed. The baselines learn from what may be known, no answer
    among it: under leave-one-out that is a click a user more than the model's weights were trained on.

    Beyond the model and the log it takes memory for some batches of a baseline's scores (64 MiB each), the lists (80
    bytes a user and baseline), and the similarities of `baselines` (at most 1.6 KB an item); never for users × items.

    Raises `InteractionsError` if the log has no item of the bundle, or as the protocol's `examine`.
    """
    if not interactions.histories_in(bundle.catalogue).items.any():
        raise InteractionsError("no item of the log is in the bundle's catalogue; give a log of the same shop")
    examination = protocol.examine(interactions, bundle.catalogue)
    asked, window, num_rows = examination.asked, bundle.config.max_len, bundle.config.num_items + 1
    lists = {MODEL: lists_by_model(bundle.model, asked.histories, window=window)}
    lists |= lists_of_baselines(examination, window=window, num_rows=num_rows)
    ranks = {name: ranks_in(each, asked.answers) for name, each in lists.items()}
    clicks = np.bincount(examination.learnable.items, minlength=num_rows)
    return Evaluation(
        users=len(asked.answers),
        unknown_answers=int((asked.answers == 0).sum()),
        protocol=protocol.to_json(bundle, interactions),
        metrics={name: metrics_of(each) for name, each in ranks.items()},
        intervals={name: intervals(each) for name, each in ranks.items()},
        difference=_difference(ranks),
        by_history_length=_groups(by_history_length(examination.clicks_before), ranks),
        by_popularity=_groups(by_popularity(asked.answers, clicks), ranks),
        exposure={name: exposure_to_json(each, asked.answers, clicks) for name, each in lists.items()},
    )


def _difference(ranks: Mapping[str, Ranks]) -> Difference:
    metrics = {name: metrics_of(each) for name, each in ranks.items()}
    best = max((name for name in ranks if name != MODEL), key=lambda name: metrics[name].ndcg_at_10)
    minus = (own - other for own, other in zip(metrics[MODEL], metrics[best], strict=True))
    return Difference(best, Metrics(*minus), intervals_of_difference(ranks[MODEL], ranks[best]))


def _groups(strata: list[Stratum], ranks: Mapping[str, Ranks]) -> dict[str, Group]:
    return {
        stratum.name: Group(
            int(stratum.users.sum()), {name: metrics_of(each[stratum.users]) for name, each in ranks.items()}
        )
        for stratum in strata
    }
