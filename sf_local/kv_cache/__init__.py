"""Which KV pages are free, used or cached. Pure Python, which touches no device."""
