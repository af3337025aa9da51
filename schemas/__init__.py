"""The contract with other teams: JSON Schemas of every message and the binary layout of the user state.

    click.schema.json                  value of a click
    recommendation.schema.json         value of a recommendation
    dead-letter-headers.schema.json    headers that a dead letter gets, as name and text
    user-state.json                    the bytes of a user state: field, offset, type, meaning
    asyncapi.yaml                      the topics: keys, headers, payloads, order, retention

The tests hold the code to these files.
"""

import json
from importlib.resources import files
from typing import Any


def load(name: str) -> dict[str, Any]:
    """One of the JSON documents above, by its file name.

    Raises:
        FileNotFoundError: there is no such document.
    """
    document: dict[str, Any] = json.loads(files(__name__).joinpath(name).read_text(encoding="utf-8"))
    return document
