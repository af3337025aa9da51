"""How often, and how high, the next click stands in the list over all items: of a model, beside plain baselines.

protocols   who is asked what, and what may be known: leave-one-out, or before and after a point in time
baselines   most popular, what followed the last item, item-kNN
ranking     scores of a batch of users → the place of the answer, or the list; never users × items at once
metrics     Recall and NDCG
bootstrap   how far they would move with other users
strata      the same by length of the history and by popularity of the answer
exposure    what the lists show of the catalogue
report      all of it, as JSON and as a table
"""

from lrurec.evaluation.metrics import Metrics, metrics_of
from lrurec.evaluation.protocols import LeaveOneOut, Protocol, TimeSplit, time_at_quantile
from lrurec.evaluation.ranking import MISSED, Scorer, rank_answers, score_by_model, score_by_popularity
from lrurec.evaluation.report import Evaluation, evaluate

__all__ = [
    "MISSED",
    "Evaluation",
    "LeaveOneOut",
    "Metrics",
    "Protocol",
    "Scorer",
    "TimeSplit",
    "evaluate",
    "metrics_of",
    "rank_answers",
    "score_by_model",
    "score_by_popularity",
    "time_at_quantile",
]
