"""A machine for `make gpu`, made here: a Python that has torch, Triton, numpy and what these need, and nothing else."""

import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

PROMISED = ("torch", "triton", "numpy")


def _needed(names: tuple[str, ...], version: str) -> dict[str, Distribution]:
    """Installed distributions of these names and of all that they require, extras apart."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower()
        if name in found:
            continue
        found[name] = distribution(name)
        required = [Requirement(text) for text in found[name].requires or []]
        environment = {"extra": "", "python_version": version}
        waiting += [each.name for each in required if each.marker is None or each.marker.evaluate(environment)]
    return found


def _files(found: Distribution) -> list[Path]:
    """Files of a distribution inside the packages' folder."""
    return [Path(str(file)) for file in found.files or [] if ".." not in file.parts and "__pycache__" not in file.parts]


def python(folder: Path) -> Path:
    """A virtual environment without pip whose packages are links to the ones installed here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    program = folder / "bin" / "python"
    asked = [str(program), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    for found in _needed(PROMISED, "3.12").values():
        for top in {file.parts[0] for file in _files(found)}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(found.locate_file(top))))
    return program


def wheels(folder: Path) -> Path:
    """pytest and what it needs, packed as wheels are."""
    folder.mkdir()
    for name, found in _needed(("pytest",), "3.12").items():
        with zipfile.ZipFile(folder / f"{name}-{found.version}-py3-none-any.whl", "w") as wheel:
            for file in _files(found):
                wheel.write(str(found.locate_file(file)), str(file))
    return folder


def installed_here(name: str) -> bool:
    """Whether a package lies in the folder of packages of this Python."""
    return (Path(sysconfig.get_path("purelib")) / name).exists()
