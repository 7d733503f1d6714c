"""The token of a cluster that demands one: Ray's own clients look for it only where they are told to."""

import os
from pathlib import Path

import ray


def use_token() -> None:
    """Turns token authentication on for this process if the user has a token and has not chosen a mode.

    `ray start` turns it on by itself when ~/.ray/auth_token exists, a client that is given an address does not, and
    every call of it is then refused.
    """
    if "RAY_AUTH_MODE" not in os.environ and (Path.home() / ".ray" / "auth_token").is_file():
        os.environ["RAY_AUTH_MODE"] = "token"
        ray._raylet.Config.initialize("")  # Ray has read the mode when it was imported: read it again
