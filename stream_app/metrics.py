"""What an operator counts: Prometheus metrics of one worker, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from stream_app.micro_batch import Outbox

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """Counters of a worker; `expose` renders them in Prometheus' text format."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.applied = self._counter("clicks_applied", "Clicks that advanced a user state")
        self.skipped = self._counter("clicks_skipped", "Clicks that an earlier run had applied already")
        self.unknown_items = self._counter("clicks_unknown_item", "Clicks on items that the model does not know")
        self.dead_letters = self._counter("dead_letters", "Messages that are no clicks")
        self.recommendations = self._counter("recommendations", "Recommendations published")
        self.micro_batches = self._counter("micro_batches", "Micro-batches that became durable")
        self.duration = Histogram(
            "stream_app_micro_batch_seconds",
            "From gathering a micro-batch to its acknowledgement",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.lag = Gauge(
            "stream_app_lag_clicks", "Clicks behind the end of the log", ["partition"], registry=self._registry
        )
        self.standby_lag = Gauge(
            "stream_app_standby_lag_records",
            "Changelog records that the copy of another worker's partition is behind",
            ["partition"],
            registry=self._registry,
        )
        self.ready = Gauge(
            "stream_app_ready", "1 while clicks flow: states are restored and Kafka answers", registry=self._registry
        )

        self.deleted_unread = Gauge(
            "stream_app_clicks_deleted_unread",
            "Offsets, of clicks or of ends of transactions, that Kafka deleted before this worker had read them",
            registry=self._registry,
        )

        self.rebalances = Gauge(
            "stream_app_rebalances", "Rebalances of the group that this worker has seen", registry=self._registry
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"stream_app_{name}", text, registry=self._registry)

    def count(self, outbox: Outbox, seconds: float) -> None:
        """Count a micro-batch that has become durable."""
        self.applied.inc(outbox.applied)
        self.skipped.inc(outbox.skipped)
        self.unknown_items.inc(outbox.unknown_items)
        self.dead_letters.inc(sum(map(len, outbox.dead_letters.values())))
        self.recommendations.inc(sum(map(len, outbox.recommendations.values())))
        self.micro_batches.inc()
        self.duration.observe(seconds)

    def expose(self) -> bytes:
        """All metrics as text."""
        return generate_latest(self._registry)


def value(counter: Counter | Gauge) -> float:
    """The current value of a metric without labels."""
    (sample, *_) = next(iter(counter.collect())).samples
    return sample.value
