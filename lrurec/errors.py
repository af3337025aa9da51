"""What can go wrong in lrurec, as users see it.

    LRURecError
    ├── ConfigError         an architecture or a training setting that cannot be
    ├── CatalogueError      item ids that cannot be a catalogue
    ├── BundleError         a folder that is not a readable, unharmed bundle
    ├── CheckpointError     published weights that cannot be converted
    ├── InteractionsError   a log of clicks that cannot be read
    ├── TrainingError       a training that cannot start or go on
    ├── DeviceError         a device that is not there
    ├── ReportError         a report that cannot be drawn or written
    └── OutputError         a standard output that cannot be written

Each carries one line: what was given, what is allowed, what to do. `lrurec` prints it and exits with code 1.
"""


class LRURecError(Exception):
    """The base of every error that lrurec raises on purpose."""


class ConfigError(LRURecError, ValueError): ...


class CatalogueError(LRURecError, ValueError): ...


class BundleError(LRURecError): ...


class CheckpointError(LRURecError): ...


class InteractionsError(LRURecError): ...


class TrainingError(LRURecError): ...


class DeviceError(LRURecError): ...


class ReportError(LRURecError): ...


class OutputError(LRURecError): ...
