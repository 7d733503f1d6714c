"""The code that a pool's version carries: what answering takes, under a package name of its own.

MLflow puts a version's code in front of the import path and leaves it there. Were it called `pipeline`, the first version
that a process loads would give its code to all later ones, and to the project itself. So each copy is named by a digest of
its contents, and versions of several releases answer beside each other. It is one archive: of ninety files each would be an
upload, and a request to a registry that is far away.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import pipeline
from pipeline.registry import pyfunc_model

NOT_SERVED = {"data", "evaluation", "learning", "planning", "prediction", "training"}
"""Rooms whose code no answer takes; none below imports from them."""

SCRIPT = "pool_model.py"
"""File that MLflow runs to get the model."""

_MODEL = """import sys
from pathlib import Path

import mlflow

sys.path.insert(0, str(Path(__file__).parent / "code" / "{package}.zip"))

from {package}{room} import {model}

mlflow.models.set_model({model}())
"""
"""What it holds; MLflow puts the folder `code` on the import path, but no archive in it."""

_PROJECT = pipeline.__name__
_WHOLE = re.compile(rf"^(\s*)import {_PROJECT}$", re.MULTILINE)
_IMPORT = re.compile(rf"^(\s*(?:from|import) ){_PROJECT}\b", re.MULTILINE)


@dataclass(frozen=True)
class ServedCode:
    """A copy of the code, as files of MLflow's."""

    archive: Path
    """Archive of the package, called like it."""
    script: Path
    """The model's own file."""

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Lets MLflow run the script while it saves the model; the code that it names is this process's own."""
        package, path = self.archive.stem, list(sys.path)
        model = f"{package}{pyfunc_model.__name__.removeprefix(_PROJECT)}"
        names = {package: pipeline, model: pyfunc_model}
        parent = model.rpartition(".")[0]
        names[parent] = sys.modules[pyfunc_model.__name__.rpartition(".")[0]]
        sys.modules.update(names)
        try:
            yield
        finally:
            sys.path[:] = path
            for name in names:
                del sys.modules[name]


def copy_code(folder: Path) -> ServedCode:
    """Copies the code that answering takes below `folder`, without the shipped weights: the base artifact holds them."""
    package = Path(pipeline.__file__).parent
    files = {file.relative_to(package): file.read_text() for file in sorted(package.rglob("*.py"))}
    files = {path: text for path, text in files.items() if path.parts[0] not in NOT_SERVED}
    digest = hashlib.sha256("\0".join(f"{path}\0{text}" for path, text in files.items()).encode()).hexdigest()[:12]
    name = f"pointsman_{digest}"
    archive, script = folder / f"{name}.zip", folder / SCRIPT
    folder.mkdir(parents=True, exist_ok=True)
    with ZipFile(archive, "w", ZIP_DEFLATED) as written:
        for path, text in files.items():
            named = _IMPORT.sub(rf"\g<1>{name}", _WHOLE.sub(rf"\1import {name} as {_PROJECT}", text))
            written.writestr(
                ZipInfo(f"{name}/{path.as_posix()}"), named, ZIP_DEFLATED
            )  # of no date: equal code, equal bytes
    served = {"package": name, "room": pyfunc_model.__name__.removeprefix(_PROJECT)}
    script.write_text(_MODEL.format(**served, model=pyfunc_model.RoutedPool.__name__))
    return ServedCode(archive, script)
