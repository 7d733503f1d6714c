import logging

import pytest

from pipeline.learning.progress import LoggedProgress, Progress
from pipeline.training.telemetry import Step


def test_without_a_terminal_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    progress: Progress = LoggedProgress()
    with caplog.at_level(logging.INFO, logger="pointsman"), progress.working("reading digits"):
        progress.log("  pool version 1 at http://user:secret@host:5000", "bold")
        progress.show(object())
        with progress.training("digits") as shown:
            shown.update([Step("digits", "expert", 1, 2, 0.5), Step("digits", "expert", 2, 2, 0.25)])
    assert caplog.messages == [
        "reading digits",
        "pool version 1 at http://host:5000",
        "digits: expert stage done, loss 0.250",
    ]
