"""`ttc bench`: lists and runs the benchmarks of a checkout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from train_then_compress import suite
from train_then_compress.cli import app

#: A benchmark that writes what it was told.
SCRIPT = '''"""How fast is it?

More words.
"""
import json, sys
from pathlib import Path

out = Path(sys.argv[sys.argv.index("--json") + 1])
out.write_text(json.dumps(sys.argv[1:]))
sys.exit(1 if out.stem == "broken" else 0)
'''


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of two, the first of which fails."""
    for name in ("broken", "whole"):
        (tmp_path / f"{name}.py").write_text(SCRIPT)
    monkeypatch.setattr(suite, "benchmarks", lambda: {path.stem: path for path in sorted(tmp_path.glob("*.py"))})
    return tmp_path


def test_without_names_the_checkouts_benchmarks_are_listed() -> None:
    told = CliRunner().invoke(app, ["bench"])
    assert told.exit_code == 0
    names = [line.split()[0] for line in told.output.splitlines()]
    assert names == sorted(path.stem for path in (Path(__file__).parents[1] / "benchmarks").glob("*.py"))
    assert {"masked_lm_training", "start_up", "growth"} < set(names)
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in told.output.splitlines())


def test_an_installed_package_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other packages may have left benchmarks of theirs there."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "theirs.py").touch()
    monkeypatch.setattr(suite, "__file__", str(tmp_path / "train_then_compress" / "suite.py"))
    told = CliRunner().invoke(app, ["bench"])
    assert told.exit_code == 2 and "checkout" in told.stderr


def test_each_is_run_and_a_failure_does_not_stop_the_rest(scripts: Path) -> None:
    out = scripts / "out"
    told = CliRunner().invoke(app, ["bench", "all", "--quick", "--cache", "here", "--out", str(out)])
    assert told.exit_code == 2 and "error: not measured: broken" in told.stderr
    given = json.loads((out / "whole.json").read_text())
    assert given == ["--cache", "here", "--json", str(out / "whole.json"), "--quick"]


def test_a_wrong_name_ends_before_anything_is_run(scripts: Path) -> None:
    told = CliRunner().invoke(app, ["bench", "whole", "speed", "--out", str(scripts / "out")])
    assert told.exit_code == 2 and "NAME=speed: no such benchmark; there are broken, whole, and all" in told.stderr
    assert not (scripts / "out").exists()
