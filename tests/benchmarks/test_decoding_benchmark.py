"""The decoding benchmark at its smallest: all find the same, and what it measures is written down."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from train_then_compress.compression.compressed import Compressed
from train_then_compress.config import Config, ConfigError, TransformerConfig
from train_then_compress.export.point import Point
from train_then_compress.models.transformer import Translator

pytest.importorskip("fairseq")
QUICK = ["--quick", "--not-alone", "--threads", "1"]


@pytest.fixture(scope="module")
def benchmark(benchmarks: Path) -> ModuleType:
    return importlib.import_module("decoding")


@pytest.fixture(scope="module")
def sinusoidal_run(translator_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run under other positions, which have no weights either: fairseq knows no rotary ones."""
    run = tmp_path_factory.mktemp("sinusoidal") / "run"
    shutil.copytree(translator_run, run)
    said = yaml.safe_load((run / "config.yaml").read_text())
    said["model"]["positions"] = "sinusoidal"
    (run / "config.yaml").write_text(yaml.safe_dump(said))
    return run


def test_all_find_the_same_and_speeds_are_recorded(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record = benchmark.main([*QUICK, "--json", str(tmp_path / "out.json")])
    assert [(one["beam"], one["batch_size"]) for one in record["beside_peers"]] == [(1, 1), (1, 2), (5, 1), (5, 2)]
    for measured in record["beside_peers"]:
        ours, theirs, generate = measured["parties"].values()
        assert list(measured["parties"]) == ["train_then_compress", "fairseq", "transformers"]
        assert list(measured["left_out"]) == ["CTranslate2 float32", "CTranslate2 int8"]
        # In wide beams that end at the limit alone, transformers ranks without the probability of </s>.
        for party in (theirs, generate) if measured["beam"] == 1 else (theirs,):
            assert party["agreement"]["sentences"] == party["agreement"]["of"] == measured["sentences"]
        assert theirs["agreement"]["largest_score_difference"] < 1e-4
        speeds = [party["sentences_per_second"]["median"] for party in (ours, theirs)]
        assert theirs["ratio"]["median"] == pytest.approx(speeds[0] / speeds[1])
    for measured in record["by_length"]:
        assert measured["lengths"] == [4, 8]
        assert all(len(facts["seconds_per_token"]) == 2 for facts in measured["parties"].values())
    printed = capsys.readouterr().out
    assert "| beam | batch | party |" in printed and "| 2 of 2 |" in printed
    assert "CTranslate2 int8 is left out: it takes trained models: --point" in printed
    assert (tmp_path / "out.json").is_file() and (tmp_path / "out.md").read_text() in printed


def test_a_draft_is_measured_beside_plain_greedy_decoding(
    benchmark: ModuleType, sinusoidal_run: Path, tmp_path: Path
) -> None:
    options = ["--point", str(sinusoidal_run), "--draft", f"{sinusoidal_run}:quant4", "--cache", str(tmp_path)]
    record = benchmark.main([*QUICK, *options])
    assert record["sources"] == "run:none on test sentences of parallel_files"
    assert "--point" not in record["command"] and str(sinusoidal_run) not in str(record)
    for measured in record["beside_peers"]:
        assert len(measured["parties"]) == 5 and not measured["left_out"]
        exact = [name for name in measured["parties"] if "int8" not in name and measured["beam"] == 1]
        assert all(measured["parties"][name]["agreement"]["sentences"] == measured["sentences"] for name in exact)
        assert all(0 <= party["bleu"] <= 100 for party in measured["parties"].values())
        assert len({measured["parties"][name]["bleu"] for name in exact}) <= 1
    for measured in record["speculative"]:
        plain, drafted = measured["parties"].values()
        assert drafted["agreement"]["sentences"] == drafted["agreement"]["of"] == measured["sentences"]
        assert 0 <= drafted["acceptance"] <= 1 and drafted["draft_length"] == 2
        assert drafted["ratio"]["median"] == pytest.approx(plain["seconds"][0] / drafted["seconds"][0])


def test_the_exponent_of_a_power_law(benchmark: ModuleType) -> None:
    lengths = [16, 32, 64]
    assert benchmark.common.exponent(lengths, [2e-3 * length**0.7 for length in lengths]) == pytest.approx(0.7)


def test_peers_that_do_not_take_the_model_are_left_out_in_words(
    benchmark: ModuleType, translator_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = benchmark.main([*QUICK, "--point", str(translator_run), "--cache", str(tmp_path)])
    for measured in record["beside_peers"]:
        assert list(measured["left_out"]) == ["fairseq", "transformers"] and len(measured["parties"]) == 3
    assert [list(measured["parties"]) for measured in record["by_length"]] == [["train_then_compress"]] * 2
    assert "fairseq has learned and sinusoidal positions only" in capsys.readouterr().out


def test_peers_whose_form_it_has_not_are_not_given_its_weights(benchmark: ModuleType) -> None:
    """Of an untied translator, and of one whose layers compression has changed."""
    shape = {"depth": 1, "width": 32, "head_size": 16, "positions": "sinusoidal"}
    decoding = benchmark.Decoding(2, max_extra=4)
    untied = Translator(TransformerConfig(**shape, tied=False), 50, 32)
    found, left_out = benchmark.decoders(untied.eval(), None, decoding, 1)
    assert set(found) == {"train_then_compress", "fairseq"} and "one embedding for all" in left_out["transformers"]
    config = Config.build({"study": "tests", "task": {"name": "translation"}, "model": {"name": "transformer", **shape},
                           "data": {"name": "debian_pairs"}})  # fmt: skip
    compressed = Compressed(Translator(TransformerConfig(**shape), 50, 32))
    compressed.change({"method": "structured", "layers": [0], "heads": [1], "ffn": [128]})
    point = Point("run:structured50", config, compressed, Path("tokenizer.json"), 50, [])
    found, left_out = benchmark.decoders(point.model, point, decoding, 1)
    assert set(found) == {"train_then_compress"}
    assert all("compression changed" in left_out[name] for name in ("fairseq", "transformers"))


def test_points_that_cannot_be_measured_end_early(benchmark: ModuleType) -> None:
    with pytest.raises(ConfigError, match="nowhere: no run there"):
        benchmark.main([*QUICK, "--point", "nowhere"])
    with pytest.raises(SystemExit):
        benchmark.main([*QUICK, "--rounds", "0"])
