"""Schedules requests and runs them; `Engine`, and the handles that callers wait with."""
