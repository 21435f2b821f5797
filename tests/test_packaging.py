"""The three lists of versions agree, and a wheel works away from the checkout."""

import os
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = "train-then-compress"

#: What only some builds of torch bring; torch names their versions itself.
CUDA = ("nvidia-", "cuda-", "triton")


def pins() -> dict[str, str]:
    """constraints.txt: version by name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    assert len({canonicalize_name(name) for name, _ in pairs}) == len(pairs), "a name stands twice"
    return {canonicalize_name(name): version for name, version in pairs}


def direct_requirements() -> list[Requirement]:
    """Everything that pyproject.toml names, extras included."""
    extras = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    named = [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]
    return [requirement for requirement in named if canonicalize_name(requirement.name) != NAME]


def needed(name: str, extras: frozenset[str], seen: set[tuple[str, str]]) -> None:
    """Add to ``seen`` what the installed package needs here, itself and through others."""
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        for extra in extras | {""}:
            found = (canonicalize_name(requirement.name), extra)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if applies and found not in seen and not found[0].startswith(CUDA):
                seen.add(found)
                needed(requirement.name, frozenset(requirement.extras), seen)


@pytest.mark.parametrize("requirement", direct_requirements(), ids=str)
def test_direct_dependencies_are_pinned(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_transitive_dependencies_are_pinned() -> None:
    seen: set[tuple[str, str]] = set()
    needed(NAME, frozenset(PROJECT["optional-dependencies"]), seen)
    assert {name for name, _ in seen} - {NAME} <= pins().keys()


def test_torch_is_pinned_to_the_tested_release() -> None:
    assert pins()["torch"] == "2.13.0"


def test_conda_environment_takes_the_same_versions() -> None:
    *from_conda, through_pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = Requirement(from_conda[0])
    assert python.name == "python" and python.specifier == SpecifierSet(PROJECT["requires-python"])
    assert from_conda[1:] == ["pip"]
    assert through_pip == {"pip": ["-c constraints.txt", f"torch=={pins()['torch']}", "-e .[dev]"]}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, unpacked."""
    built, unpacked = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("unpacked")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*build, "--wheel-dir", built, ROOT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_wheel_carries_conf(unpacked: Path) -> None:
    def files(directory: Path) -> dict[str, bytes]:
        return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.yaml")}

    assert files(unpacked / "train_then_compress" / "conf") == files(ROOT / "conf")
    assert {path.suffix for path in unpacked.iterdir()} == {"", ".dist-info"}, "more than the package is in it"


def test_wheel_composes_outside_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(unpacked)}

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "from train_then_compress.config import conf_directory; print(conf_directory())"
    assert python("-c", where).strip() == str(unpacked / "train_then_compress" / "conf")
    composed = yaml.safe_load(python("-m", "train_then_compress", "run", "--cfg", "job", "experiment=demo"))
    assert composed["study"] == "demo"
    assert not list(tmp_path.iterdir())
