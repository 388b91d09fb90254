"""TODO."""

from __future__ import annotations

MAX_PENDING = 16  # copies to wait for at a time; IREE's poller aborts at about 64
