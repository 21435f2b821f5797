"""What must be quick, or run where no torch is, loads no heavy library."""

import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest
from typer.main import get_command

from train_then_compress.cli import app

WITHOUT_TORCH = ["config", "records", "data", "analysis", "sweep"]

HELP = """
import sys
from train_then_compress.cli import app
sys.argv = ["ttc", *sys.argv[1:]]
try:
    app()
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *({"torch", "wandb", "matplotlib", "pandas", "transformers"} & sys.modules.keys()))
"""

IMPORTS = """
import sys
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
    assert "torch" not in sys.modules, name
"""


def commands(command: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The command and its subcommands, each by the words that call it."""
    inner = getattr(command, "commands", {})
    return [path] + [found for name, sub in inner.items() for found in commands(sub, (*path, name))]


def modules(name: str) -> list[str]:
    """The module and everything below it."""
    paths = getattr(import_module(name), "__path__", [])
    return [name, *(found.name for found in pkgutil.walk_packages(paths, f"{name}."))]


@pytest.mark.parametrize("words", commands(get_command(app)), ids=" ".join)
def test_help_loads_nothing_heavy(words: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", HELP, *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_these_know_no_torch() -> None:
    names = [found for name in WITHOUT_TORCH for found in modules(f"train_then_compress.{name}")]
    done = subprocess.run([sys.executable, "-c", IMPORTS, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
