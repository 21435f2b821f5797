"""`ttc run`: compose and validate every cell with Hydra, then run each unfinished one in a process of its own.

Hydra is called twice. The first pass composes all cells and runs nothing, so that a mistake in the last cell is
reported before the first has started. The second pass goes through the launcher that the user chose; its task
function starts the child process. Neither imports torch: the first child does, while Hydra composes.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train_then_compress.cell import Cell, adopt, find_teacher, locate
from train_then_compress.config import (
    Config,
    ConfigError,
    LabelledConfig,
    LabelledCorpora,
    ParallelCorpora,
    TrackerConfig,
    conf_directory,
    corpus_files,
)
from train_then_compress.config.base import reject
from train_then_compress.config.recipes import step_settings
from train_then_compress.cost import machine
from train_then_compress.data.corpora import CorpusError
from train_then_compress.data.examples import Labelled
from train_then_compress.data.fairseq_export import export_fairseq
from train_then_compress.data.pairs import Pairs
from train_then_compress.data.prepare import Prepared
from train_then_compress.records import Busy, Damaged, read_json

_ONLY_HYDRA = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--version"}
_INTERRUPTED = 130

#: Has glibc's allocator keep what a training step frees, however large, instead of faulting it in again at the next (it
#: reads these variables only when a process starts; other allocators ignore them).
_KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(32 << 20),
}  # fmt: skip

_RUN = ["-m", "train_then_compress.run"]

#: The first run's process, which waits for its config. A launcher that calls `launch` in another process finds none.
_ready: list[subprocess.Popen[str]] = []


def run(arguments: list[str]) -> int:
    """Do what ``ttc run`` was told; returns the exit status (0: every cell is done)."""
    if any(argument.split("=")[0] in _ONLY_HYDRA for argument in arguments):
        _hydra(arguments, lambda composed: None)
        return 0
    with _getting_ready():
        return _run_cells(arguments)


@contextmanager
def _getting_ready() -> Iterator[None]:
    """Have a run's process import torch already: that takes longer than all that comes before the first run."""
    _ready.append(_start(_RUN, len(machine.usable_cores()), stdin=subprocess.PIPE))
    try:
        yield
    finally:
        for unused in _ready:
            unused.kill()
            unused.communicate()
        _ready.clear()


def _run_cells(arguments: list[str]) -> int:
    multirun = [argument for argument in arguments if argument in ("-m", "--multirun")]
    # Hydra's parser takes overrides on one side of a flag only.
    arguments = [*multirun, *(argument for argument in arguments if argument not in multirun)]
    configs, errors = compose(arguments)
    if errors:
        print("\n".join(f"error: {error}" for error in errors), file=sys.stderr)
        return 2
    try:
        _check_places(configs)
        known: dict[str, Prepared | Pairs] = {}
        cells = [locate(config, known) for config in configs]
        waiting = [cell for cell in cells if not cell.done]
        if not any(argument.startswith(("hydra/launcher", "hydra.launcher")) for argument in arguments):
            _check_machine(waiting)
    except (ConfigError, CorpusError, Damaged, Busy) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    study = cells[0].directory.path.parent
    print(f"{study}: {len(cells)} runs, {len(cells) - len(waiting)} done" + ("" if waiting else "; nothing to do"))
    if waiting:
        names = [cell.plan.run_name for cell in cells]

        def launch_one(composed: DictConfig) -> None:
            launch(composed, names)

        _hydra(arguments, launch_one)
        tracker = cells[0].config.tracker
        if tracker.name == "wandb" and tracker.mode != "disabled":
            _track_frontier(study, tracker)
    return _summarize(cells)


def _check_places(configs: list[Config]) -> None:
    """Raise `ConfigError` for a sweep over several studies and for directories that cannot be made."""
    if len({(config.study, config.paths.runs) for config in configs}) > 1:
        studies = ",".join(dict.fromkeys(config.study for config in configs))
        raise reject("study", studies, "a sweep is one study; give one command for each")
    for key in ("runs", "cache"):
        path = getattr(configs[0].paths, key)
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise reject(f"paths.{key}", path, f"this directory cannot be made ({error.strerror})") from None


def _check_machine(waiting: list[Cell]) -> None:
    """Raise `Busy` now, not once for each cell, where another run holds the machine that these need."""
    for cell in waiting[:1]:
        parts = (cell, cell.below) if cell.below is not None else (cell,)
        timed = any(part.config.budget.kind == "seconds" and not part.done for part in parts)
        with machine.held(cell.config.runtime.device, timed):
            pass


def prepare_only(name: str, overrides: list[str]) -> int:
    """Prepare the corpus ``name``, for labelled text also the text that its tokenizer is trained on; say what it is."""
    configs, errors = _compose_corpus(name, overrides)
    try:
        for config in configs:
            record = locate(config).data.record
            unit = next(unit for unit in ("examples", "pairs", "tokens") if unit in record["splits"]["train"])
            counts = ", ".join(f"{split} {count[unit]:,}" for split, count in record["splits"].items())
            labels = f"; labels {', '.join(record['labels'])}" if "labels" in record else ""
            print(f"{name}: {unit} {counts}{labels}; vocabulary {record['vocab_size']:,}; {record['licence']}")
    except (ConfigError, CorpusError, Damaged) as error:
        errors.append(str(error))
    print("".join(f"error: {error}\n" for error in errors), end="", file=sys.stderr)
    return 2 if errors else 0


def export_corpus(name: str, to: str, out: Path, overrides: list[str]) -> int:
    """Prepare the corpus ``name`` and write it to the directory ``out`` in a form that another library reads."""
    configs, errors = _compose_corpus(name, overrides)
    try:
        if to != "fairseq":
            raise ConfigError(f"--to {to}: no such format; known is fairseq")
        for config in configs:
            if isinstance(config.data, LabelledConfig):
                raise reject("data", name, "labelled text has no such form; text and sentence pairs have")
            data = locate(config).data
            assert not isinstance(data, Labelled)
            export_fairseq(data, out)
            print(out)
    except (ConfigError, CorpusError, Damaged, FileExistsError) as error:
        errors.append(str(error))
    print("".join(f"error: {error}\n" for error in errors), end="", file=sys.stderr)
    return 2 if errors else 0


def _compose_corpus(name: str, overrides: list[str]) -> tuple[list[Config], list[str]]:
    """As `compose`, with what the kind of corpus needs."""
    known = [path.stem for path in corpus_files()]
    if name not in known:
        return [], [f"data={name}: no such corpus; known are {', '.join(known)}"]
    needed = []
    if name in corpora_of(LabelledCorpora):
        needed = ["task=classification", "pretrain=mlm"]
    elif name in corpora_of(ParallelCorpora):
        needed = ["task=translation", "model=transformer"]
    return compose([f"data={name}", *needed, *overrides])


def corpora_of(kinds: Any) -> list[str]:
    """The files of ``conf/data`` that name one of these kinds of data (a union of dataclasses)."""
    names = {kind.__pydantic_fields__["name"].default for kind in get_args(kinds)}
    return [path.stem for path in corpus_files() if yaml.safe_load(path.read_text())["name"] in names]


def compose(arguments: list[str]) -> tuple[list[Config], list[str]]:
    """Every cell's validated config, each once, and what is wrong with the others, in words."""
    configs: dict[str, Config] = {}
    errors: list[str] = []

    def collect(composed: DictConfig) -> None:
        try:
            config = resolve(composed)
            configs[repr(config)] = config
        except (ConfigError, Damaged) as error:
            if str(error) not in errors:
                errors.append(str(error))

    here = [argument for argument in arguments if not argument.startswith(("hydra/launcher", "hydra.launcher"))]
    with tempfile.TemporaryDirectory() as nowhere:
        _hydra([*here, f"hydra.run.dir={nowhere}", f"hydra.sweep.dir={nowhere}"], collect)
    return list(configs.values()), errors


@contextmanager
def _alike_from_one_composition() -> Iterator[None]:
    """Have Hydra compose cells that differ in plain values, not in the files they are made of, only once.

    A composition takes a good part of a second, and Hydra makes two for each cell.
    """
    original = ConfigLoaderImpl.load_sweep_config
    composed: dict[tuple[str, ...], DictConfig] = {}

    def load(self: ConfigLoaderImpl, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        values: list[Override] = []
        files: list[Override] = []
        for override in OverridesParser.create(config_loader=self).parse_overrides(sweep_overrides):
            is_value = override.type is OverrideType.CHANGE and not self.repository.group_exists(override.key_or_group)
            (values if is_value else files).append(override)
        key = tuple(str(override.input_line) for override in files)
        if key not in composed:
            composed[key] = original(self, master_config, list(key))
        config = copy.deepcopy(composed[key])
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        return config

    ConfigLoaderImpl.load_sweep_config = load  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_sweep_config = original  # type: ignore[method-assign]


def resolve(composed: DictConfig) -> Config:
    """The config with everything that depends on this machine filled in (threads, dtype, absolute paths)."""
    try:
        values: Any = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error.msg).splitlines()[0]}") from None
    values.pop("experiment", None)
    config = adopt(Config.build(values))
    for method, settings in config.steps.items():  # of those that no recipe names too: they may be added later
        step_settings(method, settings)
    if config.distill is not None:
        teacher = str(Path(find_teacher(config).directory.path).absolute())
        config = config.changed(distill=dataclasses.replace(config.distill, teacher=teacher))
    _fairseq_is_there(config)
    runtime = config.runtime
    cores = len(machine.usable_cores())
    if runtime.threads * runtime.processes > cores:
        raise ConfigError(f"runtime.threads={runtime.threads}: with {runtime.processes} processes at most "
                          f"{cores // runtime.processes} of the {cores} usable cores")  # fmt: skip
    _fits_memory(config)
    dtype = runtime.dtype
    if dtype == "auto":
        dtype = "bf16" if runtime.device == "cuda" or machine.cpu_has_bf16() else "fp32"
    threads = runtime.threads or max(1, cores // runtime.processes)
    paths = dataclasses.replace(
        config.paths, runs=str(Path(config.paths.runs).absolute()), cache=str(Path(config.paths.cache).absolute())
    )
    return config.changed(runtime=dataclasses.replace(runtime, dtype=dtype, threads=threads), paths=paths)


def _fairseq_is_there(config: Config) -> None:
    if config.model.impl == "fairseq" and importlib.util.find_spec("fairseq") is None:
        raise reject("model.impl", "fairseq", "fairseq is not installed; it comes with the extra: "
                     "pip install 'train-then-compress[fairseq]'")  # fmt: skip


def _fits_memory(config: Config) -> None:
    """Refuse a model whose training state alone is larger than this machine's memory (a GPU's is not known here)."""
    needed = 16 * config.model.matrix_weights(config.vocab_size) * config.runtime.processes
    if config.runtime.device == "cpu" and needed > machine.memory():
        raise reject("model.depth", config.model.depth, f"with model.width={config.model.width} training needs more "
                     f"than {needed / 1e9:.0f} GB (weights, gradients, two moments in fp32) and this machine has "
                     f"{machine.memory() / 1e9:.0f} GB")  # fmt: skip


def launch(composed: DictConfig, names: list[str]) -> None:
    """Hydra's task function: run one of the sweep's cells in a fresh process and wait for it; skip a finished one.

    A signal is handed on, the child writes its checkpoint, and the sweep ends with status 130.
    """
    cell = locate(resolve(composed))
    if cell.done:
        return
    print(f"[{names.index(cell.plan.run_name) + 1}/{len(names)}] {cell.plan.run_name}", flush=True)
    runtime, config = cell.config.runtime, json.dumps(dataclasses.asdict(cell.config))
    if runtime.processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={runtime.processes}"]
        child = _start([*torchrun, *_RUN, config], runtime.threads)
    else:
        child = _ready.pop() if _ready else _start(_RUN, runtime.threads, stdin=subprocess.PIPE)
        assert child.stdin is not None
        with suppress(BrokenPipeError), child.stdin as told:  # one that has died has said why
            told.write(config)
    if _interrupted_while_waiting(child):
        sys.exit(_INTERRUPTED)


def _start(arguments: list[str], threads: int, stdin: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *arguments], env=environment(threads), stdin=stdin, text=True)


def environment(threads: int) -> dict[str, str]:
    """The environment of a run's process; what the user has set for the allocator holds."""
    return _KEEP_MEMORY | os.environ | {"OMP_NUM_THREADS": str(threads)}


def _interrupted_while_waiting(child: subprocess.Popen[str]) -> bool:
    """Wait for a child; a signal is handed on to it, unless it is Ctrl-C's, which reaches it from the terminal."""
    asked: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if number == signal.SIGTERM or not _is_in_foreground():
            child.terminate()

    earlier = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        child.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    return bool(asked)


def _is_in_foreground() -> bool:
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):  # standard input is no terminal, or closed
        return False


def _summarize(cells: list[Cell]) -> int:
    """Say which cells are not done and why; 0 where all are."""
    missing = [cell for cell in cells if not cell.done]
    for cell in missing:
        part = cell if cell.below is None or cell.below.done else cell.below
        failure = read_json(part.directory.failure) or {"reason": "see above"}
        print(f"not done: {cell.directory.path}: {failure['reason']}", file=sys.stderr)
    return 1 if missing else 0


def track(study: Path) -> list[str]:
    """Replay a study into offline W&B runs, one for each run and one for its frontier; their names."""
    from train_then_compress.tracking.wandb_tracker import track_study

    tracker = TrackerConfig(name="wandb", mode="offline")
    names = track_study(study, tracker)
    if names:
        _track_frontier(study, tracker)
    return names


def _track_frontier(study: Path, tracker: TrackerConfig) -> None:
    from train_then_compress.analysis.table import load_study
    from train_then_compress.tracking.wandb_tracker import log_frontier

    points = load_study(study).points
    rows = json.loads(points[points["frontier"].fillna(False).astype(bool)].to_json(orient="records"))
    log_frontier(study, rows, tracker)


def _hydra(arguments: list[str], task: Callable[[DictConfig], None]) -> None:
    """Run a task function under Hydra's own command line, ``arguments`` unchanged."""
    kept, sys.argv = sys.argv, ["ttc run", *arguments]
    try:
        with own_groups(), _alike_from_one_composition():
            hydra.main(version_base="1.3", config_path=str(conf_directory()), config_name="run")(task)()
    finally:
        sys.argv = kept


@contextmanager
def own_groups() -> Iterator[None]:
    """Hide the groups that other libraries have registered under the names of ours: Hydra would merge
    ``task/translation`` with fairseq's, where that was imported."""
    store = ConfigStore.instance().repo
    hidden = {path.name: store.pop(path.name) for path in conf_directory().iterdir() if path.name in store}
    try:
        yield
    finally:
        store.update(hidden)
