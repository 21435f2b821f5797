"""The command ``ttc``. Modules are imported inside the commands, so that help is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from train_then_compress.analysis.table import Study as LoadedStudy

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Train Transformers of many sizes under one budget, compress them, and compare quality and cost.",
)  # fmt: skip
data = typer.Typer(no_args_is_help=True, help="List and prepare corpora.", rich_markup_mode=None)
app.add_typer(data, name="data")

Study = Annotated[Path, typer.Argument(help="A study's directory, or its name below --runs.")]
Runs = Annotated[Path, typer.Option(help="Where studies are kept (paths.runs).")]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    short_help="Train and compress: everything after it goes to Hydra.",
)
def run(context: typer.Context) -> None:
    """Train and compress. Everything after it goes to Hydra: overrides, -m, --cfg job, hydra/launcher=..."""
    from train_then_compress import sweep

    raise typer.Exit(sweep.run(context.args))


@app.command()
def table(
    study: Study,
    runs: Runs = Path("runs"),
    format: Annotated[str, typer.Option(help="md, csv or json.")] = "md",
    mean: Annotated[bool, typer.Option("--mean", help="Means over seeds, with their range.")] = False,
    engines: Annotated[Path | None, typer.Option(help="A file of ttc engines --out: its latencies too.")] = None,
) -> None:
    """Print one row per point: quality and costs."""
    from train_then_compress.analysis.table import averaged, render, with_engines
    from train_then_compress.records import read_json

    if format not in ("md", "csv", "json"):
        raise typer.BadParameter(f"{format}: allowed are md, csv and json", param_hint="--format")
    loaded = _load(_directory(study, runs))
    if engines is not None and not engines.is_file():
        raise typer.BadParameter(f"{engines}: no such file", param_hint="--engines")
    points = loaded.points if engines is None else with_engines(loaded.points, read_json(engines))
    typer.echo(render(averaged(points) if mean else points, format))
    for line in (*loaded.missing, *loaded.unsteady):
        typer.echo(line, err=True)


@app.command()
def figures(
    study: Study,
    runs: Runs = Path("runs"),
    out: Annotated[Path | None, typer.Option(help="Where to (default: figures/ in the study).")] = None,
) -> None:
    """Draw convergence and quality against cost, as SVG and PNG."""
    from train_then_compress.analysis.figures import draw

    directory = _directory(study, runs)
    loaded = _load(directory)
    drawn = draw(loaded, out or directory / "figures")
    for line in (*drawn, *loaded.missing, *loaded.unsteady):
        typer.echo(line, err=line not in drawn)
    if not drawn:
        nothing = "nothing to draw: no run of this study has learned enough yet; where the machine was slow or busy, "
        _fail(RuntimeError(f"{nothing}delete the study's directory and give the runs more (budget.value)"))


@app.command()
def track(study: Study, runs: Runs = Path("runs")) -> None:
    """Replay every run's recorded history, and the study's frontier, into offline Weights & Biases runs."""
    from train_then_compress import sweep

    directory = _directory(study, runs)
    names = sweep.track(directory)
    if not names:
        _fail(RuntimeError(f"{directory}: no run with a history yet"))
    for name in names:
        typer.echo(name)
    typer.echo(f"written to {directory / 'wandb'}; look at them by `wandb leet {directory / 'wandb'}`, or send them "
               f"by `wandb sync {directory / 'wandb'}/offline-run-*`", err=True)  # fmt: skip


@app.command()
def export(
    point: Annotated[str, typer.Argument(help="RUN_DIRECTORY (the dense model) or RUN_DIRECTORY:RECIPE.")],
    to: Annotated[
        str, typer.Option("--to", help="onnx, onnx_int8, safetensors, hf, fairseq, ctranslate2 or ctranslate2_int8.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The directory to make (default: export/RECIPE-FORMAT in the run's).")
    ] = None,
) -> None:
    """Write a point in a format that other libraries load, with its tokenizer."""
    from train_then_compress import export as exports
    from train_then_compress.config import ConfigError
    from train_then_compress.cost.engines import Unavailable
    from train_then_compress.records import Damaged

    try:
        typer.echo(exports.export(point, to, out))
    except (exports.ExportError, Unavailable, ConfigError, Damaged) as error:
        _fail(error)


@app.command("import")
def import_model(
    directory: Annotated[Path, typer.Argument(help="With model.pt, dict.txt, and encoder.json and vocab.bpe.")],
    out: Annotated[
        Path | None, typer.Option(help="The run's directory to make (default: runs/imported/ and DIRECTORY's name).")
    ] = None,
) -> None:
    """Make a run of a RoBERTa that fairseq published, for init_from: to finetune, compress and export it."""
    from train_then_compress.config import ConfigError
    from train_then_compress.imports import Incompatible, import_roberta

    try:
        typer.echo(import_roberta(directory, out or Path("runs") / "imported" / directory.resolve().name))
    except (Incompatible, ConfigError) as error:
        _fail(error)


@app.command()
def engines(
    points: Annotated[list[str], typer.Argument(help="Each RUN_DIRECTORY (the dense model) or RUN_DIRECTORY:RECIPE.")],
    engines: Annotated[
        str,
        typer.Option(help="Of eager, compiled, torchao_int8, onnx, onnx_int8, int4, comma-separated (default: all)."),
    ] = "",
    length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 128,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each engine (0: every usable core).")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each engine.")] = 10,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the numbers.")] = None,
) -> None:
    """Measure latency and throughput of points on engines, all taking turns on this machine."""
    from train_then_compress.config import ConfigError
    from train_then_compress.engines import report
    from train_then_compress.export import ExportError
    from train_then_compress.records import Busy, Damaged

    try:
        typer.echo(
            report(points, [name for name in engines.split(",") if name], length, threads, rounds, out), nl=False
        )
    except (ExportError, Busy, ConfigError, Damaged) as error:
        _fail(error)


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks, or all (none: list them).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="See that they work; the numbers mean nothing.")] = False,
    cache: Annotated[Path, typer.Option(help="Where prepared corpora are kept.")] = Path("cache"),
    out: Annotated[Path, typer.Option(help="Where to write NAME.json and NAME.md.")] = Path("bench"),
) -> None:
    """Measure this project beside its peers with the benchmarks of a checkout; the machine must be free."""
    from train_then_compress import suite
    from train_then_compress.config import ConfigError

    if not (known := suite.benchmarks()):
        _fail(RuntimeError("the benchmarks are part of a checkout of the project, not of an installed package"))
    if not names:
        for name, path in known.items():
            typer.echo(f"{name:20} {suite.question(path)}")
        return
    try:
        failed = suite.run(names, quick, cache, out)
    except ConfigError as error:
        _fail(error)
    if failed:
        _fail(RuntimeError(f"not measured: {', '.join(failed)}"))


@app.command()
def translate(
    point: Annotated[str, typer.Argument(help="RUN_DIRECTORY (the dense model) or RUN_DIRECTORY:RECIPE.")],
    beam: Annotated[int | None, typer.Option(min=1, help="Hypotheses a sentence (default: as the run's test).")] = None,
    length_penalty: Annotated[float | None, typer.Option(min=0, help="Default: as the run's test.")] = None,
    nbest: Annotated[int, typer.Option(min=0, help="So many translations: line number, score, text, by tabs.")] = 0,
    sample: Annotated[bool, typer.Option("--sample", help="Draw each token at random.")] = False,
    temperature: Annotated[float, typer.Option(min=1e-3, help="Of --sample.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Of --sample: among the likeliest tokens (0: all).")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Of --sample: among the likeliest, of so much "
                                                            "probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of --sample.")] = 0,
    draft: Annotated[str | None, typer.Option(help="A smaller model's point, to draft for this one (greedy).")] = None,
    draft_length: Annotated[int, typer.Option(min=1, help="Tokens drafted at a time.")] = 4,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Source positions in a batch, padding included.")] = 4096,
) -> None:  # fmt: skip
    """Translate standard input, a sentence a line, to standard output."""
    from train_then_compress.config import ConfigError
    from train_then_compress.evaluation.sampling import Sampling
    from train_then_compress.export import ExportError
    from train_then_compress.records import Damaged
    from train_then_compress.translate import LINES_AT_ONCE, Request, line_translator

    if not sample and (temperature, top_k, top_p, seed) != (1.0, 0, 1.0, 0):
        raise typer.BadParameter("--temperature, --top-k, --top-p and --seed are for --sample")
    sampling = Sampling(temperature, top_k, top_p) if sample else None
    request = Request(point, beam, length_penalty, nbest, sampling, seed, draft, draft_length, batch_tokens)
    try:
        translator = line_translator(request)
    except (ExportError, ConfigError, Damaged) as error:
        _fail(error)
    for line in translator(sys.stdin.buffer, 1 if sys.stdin.isatty() else LINES_AT_ONCE):
        typer.echo(line)
    for note in translator.notes:
        typer.echo(note, err=True)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="RUN_DIRECTORY (the dense model) or RUN_DIRECTORY:RECIPE.")],
    second: Annotated[str, typer.Argument(help="Another point.")],
) -> None:
    """Compare two points' translations of the test set by sacreBLEU's paired bootstrap."""
    from train_then_compress.compare import compare as compared
    from train_then_compress.config import ConfigError
    from train_then_compress.data.corpora import CorpusError
    from train_then_compress.export import ExportError
    from train_then_compress.records import Damaged

    try:
        typer.echo(compared(first, second))
    except (ExportError, ConfigError, CorpusError, Damaged) as error:
        _fail(error)


@data.command("list")
def list_corpora() -> None:
    """Name the corpora that data=NAME takes."""
    from train_then_compress.config import corpus_files

    for path in corpus_files():
        typer.echo(f"{path.stem:16} {path.read_text().splitlines()[0].removeprefix('#').strip()}")


@data.command("prepare")
def prepare_corpus(
    name: str,
    overrides: Annotated[list[str] | None, typer.Argument(help="More overrides, e.g. data.vocab_size=2048.")] = None,
) -> None:
    """Fetch, split and tokenize a corpus, so that runs find it ready."""
    from train_then_compress import sweep

    raise typer.Exit(sweep.prepare_only(name, overrides or []))


@data.command("export")
def export_corpus(
    name: str,
    to: Annotated[str, typer.Option("--to", help="fairseq: what fairseq-preprocess would have written.")],
    out: Annotated[Path, typer.Option(help="The directory to make.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="More overrides, e.g. data.vocab_size=2048.")] = None,
) -> None:
    """Write a prepared corpus, text or sentence pairs, in a form that another library reads."""
    from train_then_compress import sweep

    raise typer.Exit(sweep.export_corpus(name, to, out, overrides or []))


def _directory(study: Path, runs: Path) -> Path:
    for candidate in (study, runs / study):
        if candidate.is_dir():
            return candidate
    raise typer.BadParameter(f"neither {study} nor {runs / study} is a study's directory", param_hint="STUDY")


def _load(directory: Path) -> LoadedStudy:
    from train_then_compress.analysis.table import load_study

    try:
        return load_study(directory)
    except FileNotFoundError as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(2) from None
