"""Thousands of prompts from a file, with progress; run again, it continues where it stopped."""

import sys

from sf_local import Engine, run_batch

with Engine.from_source("demo", progress=True) as engine:
    print(run_batch(engine, *sys.argv[1:3]))  # in.jsonl, of {"prompt": ...}; out.jsonl
