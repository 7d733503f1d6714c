"""Does the runs of an experiment; the result of each is kept in a file, and found again by what it was computed from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from jobs.experiments.experiment import Experiment, Result, Run
from pipeline.config import digest
from pipeline.files import write_json
from pipeline.learning.learn import learn_stream
from pipeline.learning.opening import open_session
from pipeline.learning.progress import Progress
from pipeline.learning.state import Stopwatch, read_json
from pipeline.models.checkpoints import checkpoint, fingerprint

RESULTS = "results"
"""Folder of the results in that of an experiment."""


def results_of(
    name: str, experiment: Experiment, runs: Sequence[Run], folder: Path, progress: Progress, *, again: bool = False
) -> dict[str, list[Result]]:
    """Does the runs that were not done yet; returns all results by label, in the order of the seeds.

    `again` measures anew what was measured: what was trained is found, what evaluations had found is not.
    """
    results: dict[str, list[Result]] = {}
    for number, run in enumerate(runs, 1):
        file = result_file(experiment, run, folder)
        if again:
            forget(run, file)
        if file.exists():
            result = read_json(file)
        else:
            progress.log(f"{name}: run {number} of {len(runs)}, {run.label}, seed {run.seed}", "bold")
            watch = Stopwatch(file.with_suffix(".clock.json"))
            result = _done(name, run, progress)
            write_json(file, result | {"seconds": watch.stop()})
            result = read_json(file)
        results.setdefault(run.label, []).append(result)
    return results


def result_file(experiment: Experiment, run: Run, folder: Path) -> Path:
    """Returns where the result of a run is kept: its name depends on what is learned and measured, not on how or where."""
    parts: list[Any] = [experiment.version, run.label, run.seed]
    if run.config is not None:
        settings = run.config.to_identity(exclude={"registry", "training", "output", "name"})
        parts += [settings, fingerprint(checkpoint(run.config.base))]
    return folder / RESULTS / f"{run.label}-{run.seed}-{digest(*parts)}.json"


def forget(run: Run, file: Path) -> None:
    """Removes a run's result, and what its evaluations had found."""
    file.unlink(missing_ok=True)
    if run.config is not None:
        for evaluation in (run.config.folder / "state").glob("evaluation-*.json"):
            evaluation.unlink()


def _done(name: str, run: Run, progress: Progress) -> Result:
    if run.config is None:
        assert run.compute is not None, "a run that learns nothing computes something"
        with progress.working(f"computing {run.label}"):
            return run.compute()
    assert run.measure is not None, "what is learned is measured"
    started = False
    try:
        with open_session(run.config, job=f"experiment {name}", progress=progress) as session:
            started = session.cluster.started
            learned = learn_stream(session)
            write_json(session.folder / "summary.json", learned.summary)
            return run.measure(session, learned)
    finally:
        if started:
            ray.shutdown()  # the next run plans with this machine's cores, as if it were alone
