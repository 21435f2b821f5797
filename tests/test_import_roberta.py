"""`ttc import`: a RoBERTa that fairseq itself trained and wrote becomes a run, to finetune, compress and export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from typer.testing import CliRunner

from train_then_compress.cell import adopt, locate
from train_then_compress.cli import app
from train_then_compress.config import Config, ConfigError
from train_then_compress.data.prepare import BOS, EOS, MASK, SPECIAL_TOKENS, Prepared
from train_then_compress.export import export
from train_then_compress.export.point import find_point
from train_then_compress.export.tokenizer import has_prefix_space, write_bpe
from train_then_compress.imports import Incompatible, import_roberta
from train_then_compress.models.fairseq.checkpoint import read_roberta
from train_then_compress.records import RunDirectory
from train_then_compress.run import Run

pytest.importorskip("fairseq")
TEXT = "Ada paints the salty boat in the harbour."


@pytest.fixture(scope="module")
def published(prepared: Prepared, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What fairseq-train leaves after three updates, with the dictionary in another order than the BPE's."""
    data = tmp_path_factory.mktemp("published")
    write_bpe(prepared.tokenizer, data)
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer))
    encoded = [tokenizer.encode(line).ids for line in text_file.read_text().splitlines() if line]
    words = sorted(map(str, range(MASK + 1, tokenizer.get_vocab_size())))
    (data / "dict.txt").write_text("".join(f"{word} 1\n" for word in [*words, "madeupword0000"]))
    for split, lines in (("train", encoded[40:100]), ("valid", encoded[:40])):
        (data / split).write_text("".join(f"{' '.join(map(str, ids))}\n" for ids in lines))
    command = [
        sys.executable, "-m", "fairseq_cli.train",
        str(data), "--task", "masked_lm", "--criterion", "masked_lm", "--arch", "roberta_base",
        "--encoder-layers", "2", "--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "128",
        "--encoder-attention-heads", "4", "--max-positions", "48", "--tokens-per-sample", "48", "--optimizer",
        "adam", "--lr", "0.01", "--batch-size", "8", "--max-update", "3", "--cpu", "--dataset-impl", "raw",
        "--save-dir", str(data / "saved"), "--no-epoch-checkpoints", "--log-format", "none", "--num-workers", "0",
    ]  # fmt: skip
    # Not in this process: where Hydra has been used in the form of 1.3, what fairseq calls of it is gone.
    subprocess.run(command, check=True, capture_output=True)
    (data / "saved" / "checkpoint_last.pt").rename(data / "model.pt")
    shutil.rmtree(data / "saved")
    return data


@pytest.fixture(scope="module")
def hub(published: Path) -> Any:
    """fairseq's own idea of it; of a file that it wrote itself, pickled configuration included."""
    from fairseq.models.roberta import RobertaModel

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        return RobertaModel.from_pretrained(str(published), bpe="hf_byte_bpe").eval()


def state(directory: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([Namespace]):
        loaded: dict[str, Any] = torch.load(directory / "model.pt", weights_only=True)
    return loaded


def copied(published: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any] = lambda state: None) -> Path:
    directory = shutil.copytree(published, tmp_path / "copy")
    changed = state(directory)
    change(changed)
    torch.save(changed, directory / "model.pt")
    return directory


def assert_same_logits(hub: Any, directory: Path) -> None:
    """Of every token of a text with a mask, each language's own numbers for the same token."""
    found = read_roberta(directory)
    theirs, ours = hub.encode(TEXT), [BOS, *found.tokenizer.encode(TEXT).ids, EOS]
    assert found.tokenizer.decode(ours).strip() == TEXT and len(theirs) == len(ours)
    theirs[3], ours[3] = hub.task.mask_idx, MASK
    words = [found.tokenizer.id_to_token(number) for number in range(found.tokenizer.get_vocab_size())]
    pieces: dict[str, int] = json.loads((directory / "vocab.json").read_text())
    symbols = [word if word in SPECIAL_TOKENS else str(pieces.get(word, word)) for word in words]
    order = torch.tensor([hub.task.source_dictionary.index(symbol) for symbol in symbols])
    assert order[torch.tensor(ours)].tolist() == theirs.tolist() and order.tolist() != sorted(order.tolist())
    with torch.inference_mode():
        expected: Tensor = hub.model(theirs[None])[0][0][:, order]
        logits = found.model(torch.tensor([ours]), torch.arange(len(ours)))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_that_fairseq_wrote_has_its_logits(published: Path, hub: Any) -> None:
    assert read_roberta(published).updates == 3
    assert_same_logits(hub, published)


def test_an_untied_output_is_read_as_such(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``--untie-weights-roberta`` makes, and that its output is another matrix."""
    from fairseq.models.roberta import RobertaModel

    def untie(state: dict[str, Any]) -> None:
        state["cfg"]["model"].untie_weights_roberta = True
        weight = state["model"]["encoder.lm_head.weight"]
        state["model"]["encoder.lm_head.weight"] = weight + 0.1 * torch.randn_like(weight)

    directory = copied(published, tmp_path, untie)
    assert not read_roberta(directory).model.config.tied and read_roberta(published).model.config.tied
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert_same_logits(RobertaModel.from_pretrained(str(directory), bpe="hf_byte_bpe").eval(), directory)


def test_names_of_earlier_releases_are_known(published: Path, hub: Any, tmp_path: Path) -> None:
    """The form of roberta.base: fused projections, other prefixes, arguments in a Namespace, GPT-2's file names."""

    def age(state: dict[str, Any]) -> None:
        state["args"] = state.pop("cfg")["model"]
        assert isinstance(state["args"], Namespace)
        weights = state["model"]
        for name in [name for name in weights if "self_attn.q_proj" in name]:
            parts = [weights.pop(name.replace("q_proj", f"{which}_proj")) for which in "qkv"]
            weights[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        state["model"] = {
            name.replace("encoder.", "decoder.", 1).replace("layernorm_embedding", "emb_layer_norm"): value
            for name, value in weights.items()
        } | {"classification_heads.mnli.dense.weight": torch.zeros(2, 2)}

    directory = copied(published, tmp_path, age)
    shutil.copy(directory / "vocab.json", directory / "encoder.json")
    (directory / "merges.txt").rename(directory / "vocab.bpe")
    assert_same_logits(hub, directory)


def test_a_space_before_the_text_is_a_setting_of_earlier_releases_too(published: Path, tmp_path: Path) -> None:
    def age(state: dict[str, Any]) -> None:
        state["args"] = state.pop("cfg")["model"]
        state["args"].bpe_add_prefix_space = True

    spaced, plain = read_roberta(copied(published, tmp_path, age)), read_roberta(published)
    assert spaced.tokenizer.encode("Ada").ids == plain.tokenizer.encode(" Ada").ids != plain.tokenizer.encode("Ada").ids


def test_it_is_finetuned_compressed_and_exported_again(
    published: Path, labelled_file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untimed: None
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["import", str(published)])
    assert done.exit_code == 0, done.output
    run = tmp_path / "runs" / "imported" / published.name
    assert run.is_dir()
    config = adopt(Config.build({
        "study": "tests", "task": {"name": "classification"}, "init_from": str(run),
        "data": {"name": "csv_files", "train": str(labelled_file), "sequence_length": 32},
        "budget": {"kind": "epochs", "value": 1}, "optimizer": {"lr": 3e-3, "batch_size": 16},
        "runtime": {"dtype": "fp32", "threads": 1}, "recipes": ["none", "quant4"],
        "paths": {"runs": str(tmp_path / "runs"), "cache": str(cache)},
    }))  # fmt: skip
    cell = locate(config)
    cell.directory.write_config(config)
    Run(cell).work()
    assert {row["recipe"] for row in RunDirectory(cell.directory.path).points().values()} == {"none", "quant4"}
    directory = export(str(run), "fairseq", tmp_path / "back")
    tokens, where = torch.arange(5, 25)[None], torch.arange(20)
    assert not has_prefix_space(find_point(str(run)).tokenizer)
    back = read_roberta(directory)
    assert back.tokenizer.encode(TEXT).ids == read_roberta(published).tokenizer.encode(TEXT).ids
    with torch.inference_mode():
        again, given = back.model(tokens, where), read_roberta(published).model(tokens, where)
    torch.testing.assert_close(again, given, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r"init_from=.*own text is not known; it can be finetuned"):
        adopt(Config.build({"study": "tests", "init_from": str(run)}))
    refused = CliRunner().invoke(app, ["import", str(published)])
    assert refused.exit_code == 2 and "is there already" in refused.output


def test_what_cannot_be_read_is_refused_in_words(published: Path, tmp_path: Path) -> None:
    def refused(message: str, change: Callable[[dict[str, Any]], Any] = lambda state: None, gone: str = "") -> None:
        directory = copied(published, tmp_path, change)
        if gone:
            (directory / gone).unlink()
        with pytest.raises(Incompatible, match=message):
            import_roberta(directory, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        shutil.rmtree(directory)

    with pytest.raises(Incompatible, match="nowhere: no such directory"):
        read_roberta(tmp_path / "nowhere")
    for name in ("model.pt", "dict.txt"):
        refused(rf"{name}: no such file", gone=name)
    refused(r"the byte-level BPE is missing: encoder\.json", gone="merges.txt")
    refused(r"plain values and argparse\.Namespace: it is not loaded \(Unsupported global: GLOBAL print\)$",
            lambda state: state.update(code=print))  # fmt: skip
    refused(r"its activation_fn is relu; here it is always gelu",
            lambda state: setattr(state["cfg"]["model"], "activation_fn", "relu"))  # fmt: skip
    refused(r"dict\.txt has \d+ tokens", lambda state: state["model"].update(
        {"encoder.sentence_encoder.embed_tokens.weight": torch.zeros(7, 32)}))  # fmt: skip
    refused(r"neither args nor cfg", lambda state: state.update(cfg=None))
