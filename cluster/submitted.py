"""Whether this process is a job that was submitted to a Ray cluster; known without importing Ray."""

import json
import os
from typing import Any

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray hands a submitted job its runtime environment."""


def is_submitted() -> bool:
    """Returns whether Ray has started this process, or its parent, as a submitted job."""
    return JOB_CONFIG in os.environ


def runtime_env() -> dict[str, Any]:
    """Returns the runtime environment that this job was submitted with; empty where it was not."""
    return _config().get("runtime_env") or {}


def metadata() -> dict[str, str]:
    """Returns what this job was submitted with for the list of jobs; empty where it was not."""
    return _config().get("metadata") or {}


def _config() -> dict[str, Any]:
    return json.loads(os.environ.get(JOB_CONFIG, "{}"))
