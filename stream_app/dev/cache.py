"""Where downloads and trained demo bundles are kept between runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from stream_app.errors import SettingsError

_CACHE_VARIABLE = "STREAM_APP_CACHE_DIR"


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`STREAM_APP_CACHE_DIR`, else `stream-app` in the user's XDG cache folder.

    Raises:
        SettingsError: the variable names somebody's home, or nothing is set, and there is no such home.
    """
    if chosen := environ.get(_CACHE_VARIABLE):
        try:
            return Path(chosen).expanduser()
        except RuntimeError:
            raise SettingsError(f"{_CACHE_VARIABLE}={chosen!r} names the home of nobody; it must be a path") from None
    return _xdg(environ, "XDG_CACHE_HOME", ".cache", _CACHE_VARIABLE)


def data_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`stream-app` in the user's XDG data folder: what must survive, such as the local broker's topics.

    Raises:
        SettingsError: nothing is set, and the user has no home.
    """
    return _xdg(environ, "XDG_DATA_HOME", ".local/share", "--data-dir")


def unusable_cache(folder: Path, error: OSError) -> SettingsError:
    """The error of whoever can't make, read or write a folder of the cache."""
    return SettingsError(
        f"the cache folder {folder} cannot be used: {error.strerror}; name one that can be written by {_CACHE_VARIABLE}"
    )


def _xdg(environ: Mapping[str, str], variable: str, default: str, instead: str) -> Path:
    if base := environ.get(variable):
        return Path(base) / "stream-app"
    try:
        return Path.home() / default / "stream-app"
    except RuntimeError:
        raise SettingsError(
            f"this user has no home for {default}/stream-app; set HOME or {variable}, or name a folder by {instead}"
        ) from None
