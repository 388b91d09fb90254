"""Where downloaded models and compiled demos are kept between runs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: `$SF_LOCAL_CACHE`, else the user's cache folder. May not exist yet."""
    override = os.environ.get("SF_LOCAL_CACHE")
    if override:
        return Path(override).expanduser()
    import platformdirs  # of the extra `compile`

    return Path(platformdirs.user_cache_dir("sf-local"))
