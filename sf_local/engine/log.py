"""What engines log, to `logging.getLogger("sf_local")`, silent until a user adds a handler."""

from __future__ import annotations

import logging

from sf_local.engine.interrupts import is_main_thread

LOGGER = logging.getLogger("sf_local")


def log(level: int, message: str, *arguments: object, exc_info: bool = False) -> None:
    """Log a line. A handler that raises harms nobody: what it raised is dropped.

    Call it without holding a lock, which a handler could wait for.
    """
    try:
        LOGGER.log(level, message, *arguments, exc_info=exc_info, stacklevel=2)
    except Exception:
        pass
    except BaseException:  # Ctrl-C, or something else that would end a device's thread
        if is_main_thread():
            raise
