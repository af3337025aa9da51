"""What can go wrong outside the code: one line for an operator, with what was given, what is allowed, what to do.

StreamAppError
├── SettingsError        a STREAM_APP_* variable or an option
├── BrokerUnavailable    Kafka, or what the embedded broker needs, can't be reached in time
│   └── AccessRefused    Kafka and this client refuse each other, by TLS or by SASL
├── TopicsError          a topic is missing or does not fit
├── StateError           a stored user state does not fit this worker
└── WorkerError          the worker can't start, or had to stop
"""


class StreamAppError(Exception):
    """Base of every error that a command reports as one line."""


class SettingsError(StreamAppError):
    """A setting is missing, malformed or out of range."""


class BrokerUnavailable(StreamAppError):
    """Kafka did not answer in time, or could not be started."""


class AccessRefused(BrokerUnavailable):
    """A certificate or a credential does not do; the same settings will be refused again."""


class TopicsError(StreamAppError):
    """A topic is missing, or its partitions or policies do not fit."""


class StateError(StreamAppError):
    """A stored user state was written by another model, layout or version."""


def foreign_record(partition: int, offset: int) -> StateError:
    """Somebody else has written to a partition of the changelog that this worker holds."""
    return StateError(
        f"partition {partition} of the changelog holds a record at offset {offset} that this worker did not write: "
        "it or another one was frozen past its session and woke up; start it again: it restores every newest state"
    )


class WorkerError(StreamAppError):
    """The worker can't start, or stopped because going on would lose or double something."""


def namesake(name: str) -> WorkerError:
    """Another worker has joined the group by the name of this one."""
    return WorkerError(
        f"another worker has joined as STREAM_APP_GROUP_INSTANCE_ID={name}: give each a name of its own, such as its "
        "pod's in a StatefulSet"
    )
