"""Where Fivefold keeps its own files: a cache folder that may be deleted at any time, and the user's settings.

`FIVEFOLD_CACHE` names the cache folder itself. Otherwise it is `fivefold` inside `XDG_CACHE_HOME`, or inside the
platform's usual place (`~/.cache`, `~/Library/Caches`, `%LOCALAPPDATA%`). Settings: `fivefold` inside
`XDG_CONFIG_HOME`, `~/.config` or `%APPDATA%`. Both are read at every call, so a test can point them elsewhere.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fivefold.errors import StoreError


def cache_dir() -> Path:
    """The cache folder, made if need be. Raises StoreError when it cannot be made."""
    if own := os.environ.get("FIVEFOLD_CACHE"):
        folder = Path(own).expanduser()
    else:
        folder = _base("XDG_CACHE_HOME", "LOCALAPPDATA", ".cache", "Library/Caches") / "fivefold"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the cache folder {folder} cannot be made ({error.strerror}); set FIVEFOLD_CACHE to a folder you can"
            " write to"
        ) from None
    return folder


def config_dir() -> Path:
    """The folder of the user's own settings; it need not exist."""
    return _base("XDG_CONFIG_HOME", "APPDATA", ".config", ".config") / "fivefold"


def _base(xdg: str, windows: str, linux: str, mac: str) -> Path:
    if named := os.environ.get(xdg):
        return Path(named).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get(windows) or Path.home() / "AppData" / "Local")
    return Path.home() / (mac if sys.platform == "darwin" else linux)
