"""Where a run's results are: a folder here, and where `output` is an address, their copy there, which outlives this machine.

What is finished is copied in an order such that the run can go on elsewhere whenever this process is killed: an expert as it
enters the store, then what refers to it.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.config import LearnConfig, is_address
from pipeline.errors import StoredFileError, UserError
from pipeline.learning.progress import Progress
from pipeline.learning.run_status import CLAIMS
from pipeline.routing.expert import CARD
from pipeline.routing.pool import EXPERTS, Pool
from pipeline.routing.store import ExpertReference
from pipeline.storage.claim import Claim, claimed
from pipeline.storage.mirror import Mirror, RunMirror, SharedFiles, fetch_folder
from pipeline.storage.remote import RemoteFolder, StorageError

DATA, TRAINING = "data", "training"
"""Rows, prompts and answers of all runs; below a run's folder what its workers write."""

EVERY = 15.0
"""Seconds between two copies of what is new."""


def output_of(config: LearnConfig) -> Mirror:
    """Returns the place of all results of an `output`."""
    return Mirror(config.output_folder, RemoteFolder(config.output) if is_address(config.output) else None)


class Output:
    """The results of one run, and those that it shares with the others of its `output`."""

    def __init__(self, config: LearnConfig) -> None:
        self.place = output_of(config)
        self.run = self.place / config.name
        self.data = self.place / DATA
        self.training = self.run / TRAINING

    @property
    def experts(self) -> Path:
        """Folder of the experts of all runs, by digest."""
        return self.place.local / EXPERTS

    def shown(self, path: Path) -> str:
        """Returns what people are told of where a file is: its address, if it has one."""
        return str(self.place.at(path))

    def keep(self) -> None:
        """Copies what is new to the address."""

    def keep_expert(self, reference: ExpertReference) -> None:
        """Copies an expert to the address, unless it is there."""

    def pull(self, folder: Path, name: str) -> None:
        """Brings what all runs share, and what is about to be looked for in a folder of `data`: a file or a folder."""

    def share_pool(self, pool: Pool, folder: Mirror) -> None:
        """Lets workers on all nodes read a pool's folder, and the experts in the store that it refers to."""

    def has_expert(self, reference: ExpertReference) -> bool:
        """Whether the address has an expert that is not here."""
        return False

    def fetch_expert(self, reference: ExpertReference, folder: Path) -> bool:
        """Copies an expert from the address into a new folder; returns whether it is there."""
        return False


class KeptOutput(Output):
    """Results at an address."""

    def __init__(self, config: LearnConfig) -> None:
        super().__init__(config)
        assert self.place.remote is not None, "else it is an Output"
        self._experts = self.place.remote / EXPERTS
        self._mirror = RunMirror(self.run, apart=(TRAINING, CLAIMS))
        self._shared: dict[Path, SharedFiles] = {}
        self._there: set[str] = set()
        self._new: dict[str, Path] = {}
        """Experts that are not at the address yet."""
        self._away = False
        self._log: Callable[[str], None] = lambda text: None
        self._lock = threading.Lock()
        self._claim: Claim | None = None
        self._ended = threading.Event()

    @contextmanager
    def opened(self, progress: Progress) -> Iterator[None]:
        """Holds the run's claim, and takes what lies at the address; copies what is new meanwhile.

        Raises ClaimedError where another process works on the run, StorageError where the address cannot be used.
        """
        assert self.run.remote is not None
        self._log = progress.log
        with progress.working(f"opening {self.place}"):
            (self.run.remote / CLAIMS).check()
        with claimed(self.run.remote / CLAIMS) as self._claim:
            with progress.working(f"fetching what lies at {self.run}"):
                self._mirror.begin()
                # The card comes last: an expert without one is not complete.
                self._there = {name.split("/")[0] for name in self._experts.files() if name.endswith(f"/{CARD}")}
            thread = threading.Thread(target=self._go, name="keeping results", daemon=True)
            thread.start()
            try:
                yield
            except BaseException as error:
                self._end(thread)
                with suppress(UserError, OSError):  # the first error is the one to tell
                    self._push()
                if isinstance(error, StoredFileError):
                    raise self._at_address(error) from error
                raise
            self._end(thread)
            with progress.working(f"keeping results at {self.run}"):
                self._push()

    def _at_address(self, error: StoredFileError) -> StoredFileError:
        """Returns the error with the address of a damaged file that all runs share, whose copy here is removed.

        The copy would come back from there, so it is the one there that must be deleted.
        """
        file, _, reason = str(error).partition(": ")
        if not Path(file).is_relative_to(self.data.local):
            return error
        Path(file).unlink(missing_ok=True)
        return type(error)(f"{self.shown(Path(file))}: {reason}")

    def _end(self, thread: threading.Thread) -> None:
        self._ended.set()
        thread.join()

    def _go(self) -> None:
        while not self._ended.wait(EVERY):
            with suppress(UserError, OSError):  # told where the run itself keeps something
                self.keep()

    def keep(self) -> None:
        """Copies what is new to the address; raises LostError where the run is another one's now.

        Where the address does not answer, all of it is kept here and tried again; at the run's end that is an error.
        """
        try:
            self._push()
            self._away = False
        except StorageError as error:
            if not self._away:
                self._log(f"  {error}; results are kept in {self.run.local}, and copied when it answers again")
            self._away = True

    def _push(self) -> None:
        with self._lock:
            assert self._claim is not None
            self._claim.check()
            for digest, folder in list(self._new.items()):
                (self._experts / digest).upload_folder(folder, last=CARD)
                self._there.add(digest)
                del self._new[digest]
            for files in list(self._shared.values()):
                files.push()
            self._mirror.push()

    def keep_expert(self, reference: ExpertReference) -> None:
        """Copies an expert to the address, unless it is there."""
        assert reference.digest is not None
        if reference.digest not in self._there:
            self._new[reference.digest] = self.experts / reference.digest
            self.keep()

    def pull(self, folder: Path, name: str) -> None:
        """Brings what lies at the address under a name in a folder of `data`, and from now on what comes here, goes there."""
        if folder not in self._shared:
            self._shared[folder] = SharedFiles(self.place.at(folder))
        self._shared[folder].pull(name)

    def share_pool(self, pool: Pool, folder: Mirror) -> None:
        """Copies a pool's folder, which lies in the run's, to the address, and those of its experts that are not there."""
        assert folder.local.is_relative_to(self.run.local), "the mirror of the run copies it"
        for reference in pool.card.experts:
            if reference.digest is not None and reference.digest not in self._there:
                expert = self.experts / reference.digest
                if expert.is_dir():  # else the pool's folder holds it
                    self._new[reference.digest] = expert
        self._push()

    def has_expert(self, reference: ExpertReference) -> bool:
        """Whether the address has an expert."""
        return reference.digest in self._there

    def fetch_expert(self, reference: ExpertReference, folder: Path) -> bool:
        """Copies an expert from the address into a new folder; returns whether it is there undamaged."""
        if reference.digest is None or not self.has_expert(reference):
            return False
        fetch_folder(self._experts / reference.digest, folder)
        if reference.damage(folder) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            self._there.discard(reference.digest)  # the next one that comes into the store takes its place
            return False
        return True


@contextmanager
def open_output(config: LearnConfig, progress: Progress) -> Iterator[Output]:
    """Yields the results of a run; where they go to an address, nobody else works on the run there meanwhile."""
    if not is_address(config.output):
        yield Output(config)
        return
    output = KeptOutput(config)
    with output.opened(progress):
        yield output
