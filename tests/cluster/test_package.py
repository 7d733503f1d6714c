import zipfile
from pathlib import Path

import pytest

from cluster.package import MIB, Package, PackageError, bytes_of
from tests.cluster.conftest import ROOT


def names_in(package: Package, target: Path) -> set[str]:
    package.archive(target)
    with zipfile.ZipFile(target) as zipped:
        return set(zipped.namelist())


def test_a_folder_travels_without_environments_and_what_is_hidden(tmp_path: Path) -> None:
    for place in ("rows/a.jsonl", "rows/.git/large", "rows/env/pyvenv.cfg", "rows/env/lib/x.py", "rows/mlruns/0/meta"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("text")
    (tmp_path / "rows" / "back").symlink_to(tmp_path)
    (tmp_path / "rows" / "b.jsonl").symlink_to(tmp_path / "rows" / "a.jsonl")
    package = Package()
    package.add(tmp_path / "rows", "files/rows")
    assert names_in(package, tmp_path / "package.zip") == {"files/rows/a.jsonl", "files/rows/b.jsonl"}


def test_the_code_travels_with_its_version(tmp_path: Path) -> None:
    package = Package()
    package.add_code()
    names = set(package.sizes)
    assert {"jobs/__main__.py", "cluster/environment.py", "pipeline/models/tiny_base/model.safetensors"} <= names
    assert "jobs/configs/demo.yaml" in names
    assert any(name.endswith(".dist-info/METADATA") for name in names)
    assert not [name for name in names if "__pycache__" in name or name.endswith((".png", ".pyc")) or "tests" in name]
    assert package.bytes < 16 * MIB  # two bases that ship take eleven


def test_the_same_files_make_the_same_archive_and_only_this_user_reads_it(tmp_path: Path) -> None:
    archives = []
    for name in ("a", "b"):
        package = Package()
        package.add(ROOT / "README.md", "README.md")
        package.write("secrets.json", b"{}", mode=0o600)
        package.archive(tmp_path / name)
        archives.append((tmp_path / name).read_bytes())
    assert archives[0] == archives[1]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    with zipfile.ZipFile(tmp_path / "a") as zipped:
        modes = {entry.filename: entry.external_attr >> 16 & 0o777 for entry in zipped.infolist()}
    assert modes == {"README.md": 0o644, "secrets.json": 0o600}


def test_a_large_package_is_refused_with_its_largest_files(tmp_path: Path) -> None:
    package = Package()
    for number in range(7):
        (tmp_path / f"rows{number}").write_bytes(bytes(number * MIB // 2))
        package.add(tmp_path / f"rows{number}", f"files/rows{number}")
    package.check(11 * MIB)
    with pytest.raises(
        PackageError, match=r"10\.5 MiB, more than --package-limit 10MiB; put large data where"
    ) as error:
        package.check(10 * MIB)
    assert str(error.value).splitlines()[1] == f"          3.0 MiB  {tmp_path / 'rows6'}"
    assert "rows1" not in str(error.value)


@pytest.mark.parametrize("text", ["much", "-1", "0", "101MiB"])
def test_a_limit_that_is_none(text: str) -> None:
    with pytest.raises(PackageError, match=f"--package-limit {text}"):
        bytes_of(text)
    assert bytes_of("2MiB") == 2 * MIB
