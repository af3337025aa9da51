"""Where downloads and trained demo bundles are kept between runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`STREAM_APP_CACHE_DIR`, else `stream-app` in the user's XDG cache folder."""
    if chosen := environ.get("STREAM_APP_CACHE_DIR"):
        return Path(chosen).expanduser()
    return _xdg(environ, "XDG_CACHE_HOME", ".cache")


def data_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`stream-app` in the user's XDG data folder: what must survive, such as the local broker's topics."""
    return _xdg(environ, "XDG_DATA_HOME", ".local/share")


def _xdg(environ: Mapping[str, str], variable: str, default: str) -> Path:
    base = environ.get(variable) or Path.home() / default
    return Path(base) / "stream-app"
