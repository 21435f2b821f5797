"""The README's quick commands do what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def quick_commands() -> list[str]:
    """The command lines of the blocks marked as quick."""
    blocks = re.findall(r"<!-- quick -->\n```bash\n(.*?)```", README, re.S)
    return [line for block in blocks for line in block.splitlines() if line]


def test_quick_commands_run(tmp_path: Path, text_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small corpus, since tests fetch nothing; the budget is cut."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    commands = quick_commands()
    assert any(command.startswith("ttc track") for command in commands)
    for command in commands:
        if command.startswith("ttc run"):
            command += (
                f" data=text_files data.train={text_file} data.vocab_size=400 paths.cache={cache} budget.kind=steps"
            )
            command += " budget.value=20 data.sequence_length=32 steps.prune.recovery.max_steps=2"
            command += " runtime.threads=1"
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert list(tmp_path.glob("runs/mine/wandb/offline-run-*"))


def test_every_file_that_the_readme_links_to_is_there() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets and all((ROOT / target).exists() for target in targets), targets
