"""Opens a session: locks the run's folder, joins Ray, checks that the cluster suffices, opens MLflow; and closes all of it."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

from cluster.deepspeed_ops import build_op, extensions_folder, op_is_built
from cluster.local import connect, starts_here
from cluster.usage import PeakMemory
from pipeline import json_logs
from pipeline.config import LearnConfig, digest, without_secrets
from pipeline.errors import UserError
from pipeline.learning.checkup import check_nodes, check_room
from pipeline.learning.output import open_output
from pipeline.learning.outside_errors import outside_errors
from pipeline.learning.progress import LoggedProgress, Progress
from pipeline.learning.run_status import LOCK, RecordedProgress, StatusFile
from pipeline.learning.session import StreamSession
from pipeline.learning.training_workers import PREPARING
from pipeline.locks import LockedError, file_lock
from pipeline.memory import map_large_blocks
from pipeline.registry.migration import check_names
from pipeline.registry.tracking import log_config, open_tracking, tracked_run
from pipeline.training.session import RUN_PREFIX


class BusyError(UserError):
    """Another process works on the same run; the message says which."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds a run's folder, made if need be, for this process; raises BusyError if another one has it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(folder / LOCK, wait=False))
        except LockedError as error:
            raise BusyError(
                f"{folder}: {error.holder} works on this run; wait for its end, or give this one a `name` of its own"
            ) from None
        yield


@contextmanager
def open_session(
    config: LearnConfig,
    *,
    job: str,
    trains: bool = True,
    trainings: int | None = None,
    progress: Progress | None = None,
) -> Iterator[StreamSession]:
    """Joins or starts Ray, checks that the cluster suffices, opens MLflow; yields the session.

    `job` names the kind of MLflow run, so that learning and comparing do not write into each other's. One that never
    `trains` needs neither DeepSpeed nor a place for training workers; `trainings` is their number where it is not that of the
    stream's tasks.
    """
    progress = progress or LoggedProgress()
    if json_logs.are_wanted():
        json_logs.use_json_logs(run=config.name)
        progress = LoggedProgress()
    map_large_blocks()
    with (
        PeakMemory() as memory,
        outside_errors(config.folder),
        alone_in(config.folder),
        open_output(config, progress) as output,
        outside_errors(config.folder),  # once more: its log is kept with the other results
        _status_of(config, job) as status,
        ExitStack() as afterwards,
        _saying_how_to_go_on(progress),
    ):
        progress = RecordedProgress(progress, status)
        with tempfile.TemporaryFile(dir=config.folder):  # now, not after an hour of training
            pass
        for left in output.training.folders():
            if left.startswith(RUN_PREFIX):  # of drivers that were killed
                output.training.delete(left)
        if trains and starts_here() and not config.training.gpu:
            # Before Ray's processes are there: the compiler takes 3 GB.
            with nullcontext() if op_is_built(extensions_folder()) else progress.working(PREPARING):
                build_op(extensions_folder())
        with progress.working("starting Ray"):
            cluster = connect()
        session = StreamSession(config, cluster, progress, memory, trainings=trainings, output=output)
        # When MLflow and the user know that it has ended: where Ray was stopped too, closing waits for it for a minute.
        afterwards.push(lambda kind, *error: session.close(at_once=kind is not None))
        check_room(session.capacity, progress, trains=trains)
        check_nodes(config, progress)
        if trains:
            afterwards.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(session.capacity.driver_threads)
        with progress.working("opening MLflow"):
            experiment = session.retry(
                lambda: open_tracking(
                    config.tracking_uri,
                    config.registry.experiment,
                    artifacts=config.registry.artifacts,
                    output=without_secrets(config.output),
                    on_wait=progress.log,
                ),
                "opening MLflow",
            )
        session.retry(partial(check_names, config.base.label), "looking for experts of an earlier release")
        with tracked_run(
            experiment,
            f"{config.name} {job}",
            _name_of(session, job),
            system_metrics=config.registry.system_metrics,
        ) as run_id:
            session.experiment, session.mlflow_run_id = experiment, run_id
            log_config(run_id, config)
            session.metrics.go_on(run_id)
            session.metrics.write()  # of an earlier run, if the registry was away then
            try:
                yield session
            finally:
                if not session.metrics.write():
                    progress.log(f"  {session.metrics.waiting} points of metrics wait for the next run of this command")


def _status_of(config: LearnConfig, job: str) -> StatusFile:
    return StatusFile(config.folder, name=config.name, job=job, tasks=[task.name for task in config.stream.tasks])


def _name_of(session: StreamSession, job: str) -> str:
    """Returns the name by which an MLflow run is found again: it depends on what is learned, not on how or where."""
    settings = session.config.to_identity(exclude={"registry", "training"})
    del settings["evaluation"]["expert_memory"]
    return digest(settings, session.fingerprint, job)


@contextmanager
def _saying_how_to_go_on(progress: Progress) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            progress.log("stopped; what is finished is kept, and the same command goes on from there")
        for name in ("ray", "ray.data"):  # what still reads is about to lose Ray, and would complain
            logging.getLogger(name).setLevel(logging.CRITICAL)
        raise
