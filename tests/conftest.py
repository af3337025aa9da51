"""Shapes and types of array code are checked at run time, in tests alone; and what all tests run under."""

import os

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

#: Every module of lrurec with functions that take arrays; compiled loops have types of their own.
_CHECKED = (
    "catalogue",
    "convert",
    "device.engine",
    "device.operators",
    "device.staging",
    "device.triton_operators",
    "dropout",
    "engine",
    "evaluation",
    "interactions",
    "model",
    "published",
    "recommendation",
    "recurrence",
    "serving",
    "training.cooccurrence",
    "training.loss",
    "training.run",
    "training.train",
    "training.windows",
)

install_import_hook([f"lrurec.{module}" for module in _CHECKED], "beartype.beartype")

# Brokers of tests live for seconds: what a JVM spends on compiling well doesn't come back.
os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1")

# The first example of a property compiles what it calls, and machines that run tests are shared.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fast ones first: what starts processes or needs a broker comes last."""

    def needs_processes(item: pytest.Item) -> bool:
        return bool({"dev", "chaos"} & {*item.path.parts}) or bool(
            {"bootstrap", "secured"} & {*getattr(item, "fixturenames", ())}
        )

    items.sort(key=needs_processes)
