"""How often, and how high, the next click stands in the list over all items: of a model, beside plain baselines.

protocols   who is asked what, and what may be known: leave-one-out, or before and after a point in time
baselines   most popular, what followed the last item, item-kNN
ranking     the list for every user, and the answer's place in it; never users × items at once
metrics     Recall and NDCG
bootstrap   how far they would move with other users
strata      the same by length of the history and by popularity of the answer
exposure    what the lists show of the catalogue
report      all of it, as JSON and as a table
"""

from lrurec.evaluation.metrics import Metrics, metrics_of
from lrurec.evaluation.protocols import LeaveOneOut, Protocol, TimeSplit, time_at_quantile
from lrurec.evaluation.ranking import MISSED, Scorer, lists_by_model, ranks_in, score_by_popularity, top_lists
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
    "lists_by_model",
    "metrics_of",
    "ranks_in",
    "score_by_popularity",
    "time_at_quantile",
    "top_lists",
]
