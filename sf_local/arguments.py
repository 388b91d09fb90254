"""The parser of the commands' arguments, whose errors are one line that names the remedy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, but for its errors: it would print the usage before them, which may have thirty
    lines, and for an option of a command that of another command."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2, and the message with where to read on."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} -h\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does it; but arguments that are unknown are an error here, in the command
        that they were given to."""
        found, unknown = super().parse_known_args(args, namespace)
        if not unknown:
            return found, unknown
        name = unknown[0].partition("=")[0]
        options = [option for action in self._actions for option in action.option_strings]
        near = get_close_matches(name, options, 1) if name.startswith("-") else []
        what = "no such option" if name.startswith("-") else "one argument too many"
        self.error(f"{name}: {what}" + (f", did you mean {near[0]}?" if near else ""))
