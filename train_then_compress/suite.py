"""`ttc bench`: the benchmarks of a checkout, each in a process of its own, one after the other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from train_then_compress.config.base import reject


def benchmarks() -> dict[str, Path]:
    """The suite's scripts by name; none in an installed package, whatever lies beside it."""
    root = Path(__file__).resolve().parents[1]
    scripts = sorted(root.glob("benchmarks/*.py")) if (root / "pyproject.toml").is_file() else []
    return {path.stem: path for path in scripts}


def question(path: Path) -> str:
    """What a benchmark measures: the first line of its docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def run(names: list[str], quick: bool, cache: Path, out: Path) -> list[str]:
    """Run benchmarks (``all``: every one); each writes NAME.json and NAME.md to ``out``. Returns those that failed.

    Raises `ConfigError` for a name that there is not, before the first begins.
    """
    known = benchmarks()
    wanted = list(known) if names == ["all"] else names
    for name in wanted:
        if name not in known:
            raise reject("NAME", name, f"no such benchmark; there are {', '.join(known)}, and all")
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in wanted:
        print(f"{name}: {question(known[name])}", flush=True)
        options = ["--cache", str(cache), "--json", str(out / f"{name}.json"), *(["--quick"] if quick else [])]
        if subprocess.run([sys.executable, str(known[name]), *options]).returncode:
            failed.append(name)
    return failed
