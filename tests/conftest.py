"""What the tests share: a made-up language to train on, small configs, and the reference libraries."""

from __future__ import annotations

import atexit
import copy
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings
from typer.testing import CliRunner

from train_then_compress.cli import app
from train_then_compress.config import Config
from train_then_compress.data.prepare import Prepared, prepare

# Runs hold their machine through files in the temporary directory: the processes of pytest-xdist must not meet there.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="train_then_compress-tests-")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

# Shared machines are slow now and then, and a failure must be seen again: no deadline, the same examples every time.
settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("tests")

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # tests of exports import ONNX Runtime themselves


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of whole commands, which are the slowest, go first: no process is left alone with one at the end."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


_PLACES = ["harbour", "orchard", "workshop", "library", "mountain", "kitchen"]
_THINGS = [
    ["boat", "net", "anchor", "rope", "lantern"],
    ["apple", "ladder", "basket", "beehive", "pear"],
    ["hammer", "bench", "wheel", "spring", "lathe"],
    ["book", "letter", "map", "shelf", "catalogue"],
    ["stone", "path", "goat", "glacier", "hut"],
    ["kettle", "spoon", "oven", "loaf", "barrel"],
]
_KINDS = [
    ["tarred", "salty", "floating"],
    ["ripe", "sweet", "wooden"],
    ["rusty", "heavy", "polished"],
    ["printed", "faded", "borrowed"],
    ["steep", "frozen", "distant"],
    ["warm", "round", "copper"],
]
_VERBS = [("carries", "carry"), ("paints", "paint"), ("finds", "find"), ("mends", "mend"), ("counts", "count")]
_PEOPLE = [("Ada", "She"), ("Boris", "He"), ("Clara", "She"), ("Dmitri", "He"), ("Elin", "She"), ("Farid", "He")]
_NUMBERS = ["two", "three", "four", "five", "seven"]


def _sentence(choose: random.Random, place: int, person: tuple[str, str], thing: str) -> str:
    """One sentence; number agrees with the verb, the pronoun with the person, things and their kinds with the place."""
    kind, (one, many), count = choose.choice(_KINDS[place]), choose.choice(_VERBS), choose.choice(_NUMBERS)
    other = choose.choice(_THINGS[place])
    return choose.choice(
        [
            f"{person[0]} {one} the {kind} {thing} in the {_PLACES[place]}.",
            f"{person[1]} {one} {count} {other}s and a {kind} {thing}.",
            f"{count.capitalize()} people {many} the {thing}s near the {_PLACES[place]}.",
            f"When the {thing} is {kind}, {person[0]} {one} it.",
            f"Does the {_PLACES[place]} have {count} {kind} {other}s?",
        ]
    )


def _document(choose: random.Random) -> str:
    place, person = choose.randrange(len(_PLACES)), choose.choice(_PEOPLE)
    thing = choose.choice(_THINGS[place])
    lines = []
    for _ in range(choose.randint(1, 3)):
        lines.append(" ".join(_sentence(choose, place, person, thing) for _ in range(choose.randint(2, 6))))
    return "\n".join(lines)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors are fastest on one thread, above all beside other processes."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of a small grammar (places, people, things, agreement), in blocks between blank lines."""
    choose = random.Random(20240607)
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n\n".join(_document(choose) for _ in range(300)) + "\n")
    return path


@pytest.fixture(scope="session")
def labelled_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 sentences of the same grammar, labelled with their place."""
    choose = random.Random(20240608)
    path = tmp_path_factory.mktemp("labelled") / "sentences.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for _ in range(400):
            place = choose.randrange(len(_PLACES))
            sentence = _sentence(choose, place, choose.choice(_PEOPLE), choose.choice(_THINGS[place]))
            rows.writerow([sentence, _PLACES[place]])
    return path


def _translated(sentence: str) -> str:
    """A language made for the tests: words of mirrored letters, in the order of verb or first word last."""
    words = [word[::-1].lower() for word in sentence[:-1].split()]
    return " ".join([*words[1:], words[0]]).capitalize() + sentence[-1]


@pytest.fixture(scope="session")
def parallel_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 600, 40 and 40 different sentences of the same grammar and their translations, in two files each
    (``train.en``, ``train.xx``, ``valid.en``, ..).
    """
    choose = random.Random(20240609)
    directory = tmp_path_factory.mktemp("parallel")
    sentences: dict[str, None] = {}
    while len(sentences) < 680:
        place = choose.randrange(len(_PLACES))
        sentences[_sentence(choose, place, choose.choice(_PEOPLE), choose.choice(_THINGS[place]))] = None
    rest = list(sentences)
    for split, count in (("train", 600), ("valid", 40), ("test", 40)):
        lines, rest = rest[:count], rest[count:]
        (directory / f"{split}.en").write_text("\n".join(lines) + "\n")
        (directory / f"{split}.xx").write_text("\n".join(map(_translated, lines)) + "\n")
    return directory


@pytest.fixture(scope="module")
def untimed() -> Iterator[None]:
    """For tests that are not about speed, which takes time to measure."""
    from train_then_compress.cost import latency, machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "calibrate", lambda device: {})
        patch.setattr(latency, "measure", lambda call: (1.0, 0.0))
        yield


@pytest.fixture(scope="session")
def assert_same_weights() -> Callable[[Path, Path], None]:
    """A function that compares the tensors in every file that the stages of two runs left."""
    import torch
    from safetensors.torch import load_file

    def weights_below(run: Path) -> dict[str, dict[str, torch.Tensor]]:
        return {str(path.relative_to(run)): load_file(path) for path in sorted(run.glob("stages/**/*.safetensors"))}

    def compare(first: Path, second: Path) -> None:
        a, b = weights_below(first), weights_below(second)
        assert a.keys() == b.keys() and a
        for name in a:
            assert all(torch.equal(a[name][key], b[name][key]) for key in a[name]), name

    return compare


@pytest.fixture(scope="session")
def ttc() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs the command in a directory: ``ttc("run", "-m", ..., cwd=path)``."""
    program = str(Path(sys.executable).with_name("ttc"))

    def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def ttc_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`ttc` in this process, for commands that end before a run starts."""
    from train_then_compress import sweep

    monkeypatch.setattr(sweep, "_getting_ready", nullcontext)

    def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        done = CliRunner().invoke(app, arguments)
        if not isinstance(done.exception, SystemExit | None):
            raise done.exception
        assert "Traceback" not in done.stderr
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def run_here() -> Callable[..., list[Path]]:
    """A function that does what `ttc run` does, in this process, for tests that are not about processes:
    ``run_here("-m", ..., cwd=path)``. It gives the runs' directories and lets every error out."""

    def run(*arguments: str, cwd: Path) -> list[Path]:
        from train_then_compress import sweep
        from train_then_compress.cell import locate
        from train_then_compress.run import work

        configs, errors = sweep.compose([*arguments, f"paths.runs={cwd / 'runs'}"])
        assert not errors
        cells = [locate(config) for config in configs]
        for cell in cells:
            if not cell.done:
                work(cell)
        return [cell.directory.path for cell in cells]

    return run


@pytest.fixture(scope="session")
def kill_at() -> Callable[[Path, list[str], str, int], None]:
    """A function that starts `ttc` in a directory, in a process group of its own, and kills the group once a stage's
    checkpoint of a step is there, below ``runs/killed``."""
    program = str(Path(sys.executable).with_name("ttc"))

    def kill(directory: Path, arguments: list[str], stage: str, step: int) -> None:
        process = subprocess.Popen(
            [program, *arguments], cwd=directory, start_new_session=True, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            reached = [int(path.name[5:]) for path in directory.glob(f"runs/killed/*/checkpoint/{stage}-*/step-*")]
            if max(reached, default=0) >= step:
                break
            time.sleep(0.002)
        assert process.poll() is None, f"ended before {stage} reached step {step}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    return kill


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for prepared corpora, one for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def common(text_file: Path, cache: Path) -> list[str]:
    """Overrides that make `ttc run` quick: a small corpus and shape, few steps."""
    return [
        "data=text_files", f"data.train={text_file}", f"paths.cache={cache}", "data.vocab_size=400",
        "data.sequence_length=32", "model.depth=1", "model.width=32", "model.head_size=16", "budget=steps",
        "budget.value=30", "optimizer.batch_size=8", "optimizer.lr=3e-3", "evaluation.points=3", "runtime.threads=1",
        "runtime.dtype=fp32", "checkpoint.every_seconds=0", "steps.prune.recovery.max_steps=20",
        "steps.prune.recovery.check_every=5", "steps.prune.recovery.target=1",
    ]  # fmt: skip


def _translation(parallel_files: Path, cache: Path, runs: Path) -> dict[str, Any]:
    """A small translator's config."""
    splits = {split: str(parallel_files / split) for split in ("train", "valid", "test")}
    return {
        "study": "tests", "task": {"name": "translation"},
        "data": {"name": "parallel_files", "target": "xx", "vocab_size": 400, **splits},
        "model": {"name": "transformer", "depth": 1, "width": 32, "head_size": 16, "positions": "rotary"},
        "budget": {"kind": "steps", "value": 20}, "optimizer": {"lr": 3e-3, "batch_tokens": 512},
        "evaluation": {"points": 3, "bleu_sentences": 10, "test_sequences": 20, "beam": 2},
        "runtime": {"dtype": "fp32", "threads": 1}, "paths": {"runs": str(runs), "cache": str(cache)},
    }  # fmt: skip


def _values(text_file: Path, cache: Path, runs: Path) -> dict[str, Any]:
    return {
        "study": "tests",
        "data": {"name": "text_files", "train": str(text_file), "vocab_size": 400, "sequence_length": 32},
        "model": {"depth": 2, "width": 32, "head_size": 16},
        "budget": {"kind": "steps", "value": 20},
        "optimizer": {"lr": 3e-3, "batch_size": 8},
        "evaluation": {"points": 3},
        "runtime": {"dtype": "fp32", "threads": 1},
        "paths": {"runs": str(runs), "cache": str(cache)},
    }


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.copy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


@pytest.fixture
def build_config(text_file: Path, cache: Path, tmp_path: Path) -> Callable[..., Config]:
    """A function that builds a small config; overrides are laid over it key by key: ``model={"depth": 1}, seed=3``."""

    def build(**overrides: Any) -> Config:
        return Config.build(_merge(_values(text_file, cache, tmp_path / "runs"), overrides))

    return build


@pytest.fixture(scope="session")
def prepared(text_file: Path, cache: Path) -> Prepared:
    """The small config's corpus, prepared."""
    return prepare(Config.build(_values(text_file, cache, cache)).data, cache)


@pytest.fixture
def build_task(
    build_config: Callable[..., Config], labelled_file: Path, prepared: Prepared, cache: Path, parallel_files: Path,
    tmp_path: Path,
) -> Callable[..., Any]:  # fmt: skip
    """A function that makes a small task, `mlm`, `classification` or `translation`; overrides as in `build_config`."""
    from train_then_compress.config.labelled import CsvFiles
    from train_then_compress.config.parallel import ParallelConfig
    from train_then_compress.data.examples import prepare_labelled
    from train_then_compress.data.pairs import prepare_pairs
    from train_then_compress.tasks import task_of

    def build(name: str, **overrides: Any) -> Any:
        if name == "mlm":
            return task_of(build_config(**overrides), prepared)
        if name == "translation":
            config = Config.build(_merge(_translation(parallel_files, cache, tmp_path / "runs"), overrides))
            assert isinstance(config.data, ParallelConfig)
            return task_of(config, prepare_pairs(config.data, cache))
        data = {"name": "csv_files", "train": str(labelled_file), "sequence_length": 32}
        values = {
            "task": {"name": "classification"}, "pretrain": {"data": {"name": "sotu_wiki", "sequence_length": 32}},
            "data": data, "model": {"depth": 2, "width": 32, "head_size": 16}, "optimizer": {"batch_size": 8},
            "runtime": {"dtype": "fp32", "threads": 1}, "budget": {"kind": "epochs", "value": 1},
        }  # fmt: skip
        config = Config.build(_merge(values, overrides))
        corpus = CsvFiles(train=str(labelled_file), sequence_length=32)
        return task_of(config, prepare_labelled(corpus, prepared.tokenizer, cache))

    return build


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """The reference library.

    It imports any torchaudio that is installed (fairseq requires one), and falls over one that was built for another
    torch, such as PyPI's CUDA build beside a CPU-only torch. Nothing here needs sound: such a torchaudio is hidden.
    """
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = None  # type: ignore[assignment]
    import transformers

    return transformers


def _finished(config: Config) -> Path:
    """A whole run in this process; its directory."""
    from train_then_compress.cell import locate
    from train_then_compress.run import Run

    cell = locate(config)
    cell.directory.write_config(config)
    Run(cell).work()
    return cell.directory.path


@pytest.fixture(scope="session")
def masked_lm_run(text_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of the small config, with four points."""
    values = _values(text_file, cache, tmp_path_factory.mktemp("masked_lm"))
    more = {
        "model": {"depth": 1}, "recipes": ["none", "quant4", "prune30", "prune30+quant4"],
        "steps": {"prune": {"recovery": {"max_steps": 2}}},
    }  # fmt: skip
    return _finished(Config.build(_merge(values, more)))


@pytest.fixture(scope="session")
def classifier_run(
    masked_lm_run: Path, labelled_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The directory of a finished run that finetunes `masked_lm_run`, with two points."""
    from train_then_compress.cell import adopt

    values = {
        "study": "tests", "task": {"name": "classification"}, "init_from": str(masked_lm_run),
        "data": {"name": "csv_files", "train": str(labelled_file), "sequence_length": 32},
        "budget": {"kind": "epochs", "value": 1}, "optimizer": {"lr": 3e-3, "batch_size": 16},
        "runtime": {"dtype": "fp32", "threads": 1}, "recipes": ["none", "quant4"],
        "paths": {"runs": str(tmp_path_factory.mktemp("classifier")), "cache": str(cache)},
    }  # fmt: skip
    return _finished(adopt(Config.build(values)))


@pytest.fixture(scope="session")
def translator_run(parallel_files: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of a translator that has learned a little, with two points; its speeds are not
    measured."""
    values = _translation(parallel_files, cache, tmp_path_factory.mktemp("translator"))
    more = {
        "model": {"width": 64}, "budget": {"value": 150}, "optimizer": {"lr": 5e-3, "batch_tokens": 1024},
        "recipes": ["none", "quant4"],
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train_then_compress.cost.latency.measure", lambda call: (1.0, 0.0))
        return _finished(Config.build(_merge(values, more)))
