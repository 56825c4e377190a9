"""Inputs on which users' runs broke, as small copies in `tests/cases`: each with its right outcome."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import leanbert
from leanbert.data.token_labels import SemanticRoleData, TokenLabelData
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.tasks.output_metrics import bleu, rouge
from tests import launcher

ROOT = Path(__file__).parents[1]
CASES = Path(__file__).parent / "cases"
SECONDS = 60
PLACES = "--data.cache_dir {out}/cache --trainer.default_root_dir {out}/runs"
TINY = f"--config {CASES}/tiny.yaml {PLACES}"
CLASSIFY = f"--config configs/classification.yaml {TINY}"
MLM = f"--config configs/mlm.yaml {TINY}"
TAG = f"--config {CASES}/tagging.yaml {PLACES}"

pytestmark = pytest.mark.usefixtures("launcher_socket")


@dataclass
class Place:
    """The folder of a case, an empty one, and how its commands ended."""

    case: Path
    out: Path
    done: list[subprocess.CompletedProcess[str]] = field(default_factory=list)

    def answer(self) -> Any:
        """Return what the last command has printed."""
        return json.loads(self.done[-1].stdout)

    def model(self, number: int = 0) -> Any:
        """Return the model of a run."""
        return leanbert.load(next((self.out / "runs").glob(f"*/version_{number}"))).model


@dataclass(frozen=True)
class Case:
    """Commands, of which the last ends with a `code` and says what matches `says`, and a right value."""

    commands: tuple[str, ...] = ()
    code: int = 0
    says: str = ""
    make: Callable[[Place], object] | None = None
    value: Callable[[Place], Any] | None = None
    right: Any = None


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, launcher.__file__, *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip


def fit(arguments: str, files: str = "train.csv", val: str = "val.csv") -> str:
    return f"fit {arguments} --data.train_files {{case}}/{files} --data.val_files {{case}}/{val}"


def spelled(*texts: str) -> Callable[[Place], Any]:
    """Return what spells texts by the case's tokenizer."""

    def value(place: Place) -> list[list[str]]:
        tokenizer = TextTokenizer.from_file(str(place.case / "tok"))
        return [[tokenizer.token(token) for token in ids] for ids in tokenizer.encode_batch(list(texts))]

    return value


# ---- what the inputs of some cases are made by


def write_genome(place: Place) -> None:
    """Write DNA on one line."""
    (place.out / "genome.txt").write_text("".join(random.Random(2).choices("ACGT", k=400_000)) + "\n")


def write_null_parquet(place: Place) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = ["one lamp"] * 3000 + [None] + ["a boat"] * 50
    parquet.write_table(pyarrow.table({"text": texts}), place.out / "null.parquet")


def write_bert(place: Place) -> Any:
    """Write and return a small BERT of transformers, with a bias that decides."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(1)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        "the",
        "green",
        "lamp",
        "boat",
    ]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=128, initializer_range=0.4, **sizes)
    model = BertForMaskedLM(config).eval()
    torch.nn.init.normal_(model.cls.predictions.bias, std=2.0)
    model.save_pretrained(place.out / "hf")
    (place.out / "hf" / "vocab.txt").write_text("\n".join(words) + "\n")
    return model


def write_decoder_bias_only(place: Place) -> None:
    from safetensors.torch import save_file

    weights = write_bert(place).state_dict()
    kept = {name: weight.clone() for name, weight in weights.items() if name != "cls.predictions.bias"}
    save_file(kept, place.out / "hf" / "model.safetensors", metadata={"format": "pt"})


def write_config_without_type(place: Place) -> None:
    write_bert(place)
    path = place.out / "hf" / "config.json"
    config = json.loads(path.read_text())
    for name in ("model_type", "architectures", "transformers_version"):
        config.pop(name, None)
    path.write_text(json.dumps(config))


def write_named_special_tokens(place: Place) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["<PAD>", "<UNK>", "<BEG>", "<END>", "<BLANK>", "the", "lamp"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<UNK>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(words[:5])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<BEG> $A <END>", special_tokens=[("<BEG>", 2), ("<END>", 3)]
    )
    tokenizer.save(str(place.out / "tokenizer.json"))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), words, strict=False))
    (place.out / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
    )


# ---- what is looked at


def masked_by_transformers(place: Place) -> list[tuple[str, float]]:
    from transformers import BertForMaskedLM, BertTokenizerFast

    tokenizer = BertTokenizerFast(str(place.out / "hf" / "vocab.txt"))
    model = BertForMaskedLM.from_pretrained(place.out / "hf").eval()
    with torch.inference_mode():
        logits = model(**tokenizer("the green [MASK] boat", return_tensors="pt")).logits
    best = logits.softmax(-1)[0, 3].topk(2)
    return [
        (tokenizer.convert_ids_to_tokens(int(i)), pytest.approx(float(p), abs=1e-5)) for p, i in zip(*best, strict=True)
    ]


def masked(place: Place) -> list[tuple[str, float]]:
    return [(found["token"], found["probability"]) for found in place.answer()["masks"][0][:2]]


def roles_of_pounds(place: Place) -> Any:
    data = SemanticRoleData(word_column=0, role_columns=6, last_column=True, find_predicates=False)
    return [(sentence.tokens, labels) for _, sentence, labels in data.reader.read([str(place.case / "c05.conll")])]


def tagged(name: str) -> Callable[[Place], Any]:
    """Return what reads the first sentence of a file of the case."""

    def value(place: Place) -> Any:
        _, sentence, labels = next(iter(TokenLabelData().reader.read([str(place.case / name)])))
        return sentence.tokens, labels

    return value


def script_of_the_answer(place: Place) -> bool:
    """Return whether a token of the answer is Cyrillic."""
    return any("\u0400" <= letter < "\u0500" for found in place.answer()["masks"][0] for letter in found["token"])


LEARNING = "--model.optimizer.name adamw --model.optimizer.lr 3e-3 --model.schedule.name constant"
RESUMED = f"{LEARNING} --trainer.val_check_interval 40"
CSV_LOGGER = "--config {case}/csvlogger.yaml"
SMALL_SET = "hf:{case}/set:small-v1:train"
EQUAL = {"rouge1": 100.0, "rouge2": 100.0, "rougeL": 100.0, "rougeLsum": 100.0}

CASE = {
    "resume-with-labels-in-another-order": Case(
        (
            fit(f"{CLASSIFY} {RESUMED} --trainer.max_steps 80", "a.csv"),
            fit(f"{CLASSIFY} {RESUMED} --trainer.max_steps 120 --ckpt_path last", "b.csv"),
        ),
        value=lambda place: json.loads(next(place.out.rglob("summary.json")).read_text())["metrics"]["val/accuracy"],
        right=1.0,
    ),
    "added-tokens-json": Case(
        value=spelled("the zorblax and quindle"),
        right=[["[CLS]", "the", "zorblax", "a", "##n", "##d", "quindle", "[SEP]"]],
    ),
    "csv-rows-with-more-cells-than-the-header": Case(
        (fit(CLASSIFY),), 2, r"error: .*train\.csv:32: 3 cells.* header.* 2"
    ),
    "last-is-of-an-older-run-with-another-logger": Case(
        (
            f"fit {MLM} --data.train_files {{case}}/old.txt",
            f"fit {MLM} --data.train_files {{case}}/new.txt {CSV_LOGGER} "
            "--trainer.logger.init_args.save_dir {out}/logs",
            f"predict {MLM} {CSV_LOGGER} --ckpt_path last --data.predict_files {{case}}/mask.txt",
        ),
        value=script_of_the_answer,
        right=True,
    ),
    "multi-hot-labels": Case(
        (fit(f"{CLASSIFY} --data.problem multi", "hot.jsonl", "hot.jsonl"),),
        value=lambda place: place.model().labels,
        right=["0", "1", "2"],
    ),
    "lists-as-text": Case(
        (fit(f"{CLASSIFY} --data.problem multi", "list.csv", "list.csv"),),
        value=lambda place: sorted(place.model().labels),
        right=["funny", "rude", "short"],
    ),
    "regression-with-inf-and-nan": Case(
        (fit(f"{CLASSIFY} --data.problem regression --data.label_field score --checkpoint.monitor val/spearman"),),
        2, r"error: .*train\.csv:42: .*inf.*finite",
    ),
    "hf-data-set-among-files-of-a-task": Case(
        (fit(CLASSIFY).replace("{case}/train.csv", '\'["hf:{case}/set", "{case}/more.csv"]\''),),
        says=r"train +120 examples",
    ),
    "rouge-of-other-scripts": Case(
        value=lambda _: [rouge([text], [[text]]) for text in ("тихий рынок прячет письмо", "नदी बहती है", "山水月日")],
        right=[EQUAL] * 3,
    ),
    "rouge-of-umlauts": Case(
        value=lambda _: rouge(["die brücke ist grün"], [["die brücke ist kühn"]])["rouge1"], right=pytest.approx(75.0)
    ),
    "bleu-of-chinese": Case(
        value=lambda _: bleu(
            ["山水月日风花雪夜人。", "家书车门马鱼鸟山水。", "风花雪夜人家书门。"],
            [["山水月日风花雪夜人家。"], ["家书车门马鱼鸟山水月。"], ["风花雪夜人家书车门。"]],
            "zh",
        ),
        right=pytest.approx(78.8, abs=0.05),
    ),
    "one-endless-word": Case(
        (f"prepare {MLM} --data.train_files {{out}}/genome.txt --data.val_files {{case}}/val.txt",), make=write_genome
    ),
    "one-label": Case((fit(CLASSIFY, val="train.csv"),), 2, r'error: .*one label.*"?spam'),
    "vocab-txt-with-a-token-twice": Case(
        value=lambda place: TextTokenizer.from_file(str(place.case / "tok")).encode_batch(["the green lamp"])[0][1:-1],
        right=[58, 59, 60],
    ),
    "vocab-txt-with-a-byte-order-mark": Case(
        value=spelled("the green lamp"), right=[["[CLS]", "the", "green", "lamp", "[SEP]"]]
    ),
    "null-text": Case((f"prepare {MLM} --data.train_files {{case}}/null.jsonl",), says=r"\b1 .*(no|without) text"),
    "null-text-in-parquet": Case(
        (f"prepare {MLM} --data.train_files {{out}}/null.parquet",),
        says=r"\b1 .*(no|without) text", make=write_null_parquet,
    ),
    "conll-2003-as-it-is-distributed": Case(
        (fit(TAG, "eng.conll", "eng.conll"),),
        value=tagged("eng.conll"),
        right=(["Mira", "Holt", "left", "Varna"], ["B-PER", "I-PER", "O", "B-LOC"]),
    ),
    "official-name-of-conll-2012-files": Case(
        (fit(f"--config configs/srl.yaml {TINY}", "aa_0001.v4_gold_conll", "aa_0001.v4_gold_conll"),),
        value=lambda place: sorted(place.model().labels), right=["B-ARG0", "B-ARG1", "B-PRED", "B-V", "I-ARG1", "O"],
    ),
    "translation-records-of-transformers": Case(
        (
            f"fit --config configs/translation.yaml {TINY} --data.train_files {{case}}/t.jsonl "
            "--data.source_field translation.en --data.target_field translation.xx --model.validation_sources 4",
        ),
        value=lambda place: place.model().task, right="seq2seq",
    ),
    "pounds-in-conll-2005": Case(
        value=roles_of_pounds, right=[(["It", "costs", "#", "5"], ["B-A0", "B-V", "B-A1", "I-A1"])]
    ),
    "words-with-a-space-in-tab-separated-columns": Case(
        (fit(TAG, "t.conll", "t.conll"),),
        value=tagged("t.conll"), right=(["Ada", "sold", "10 000", "kg"], ["B-PER", "O", "O", "O"]),
    ),
    "words-with-a-no-break-space": Case(
        value=tagged("n.conll"), right=(["Ada", "sold", "10\u00a0000", "kg"], ["B-PER", "O", "O", "O"])
    ),
    "bias-stored-as-decoder-bias-only": Case(
        (f"predict {MLM} --model.init_from {{out}}/hf --data.predict_files {{case}}/mask.txt",),
        make=write_decoder_bias_only, value=masked, right=masked_by_transformers,
    ),
    "config-json-without-model-type": Case(
        (f"predict {MLM} --model.init_from {{out}}/hf --data.predict_files {{case}}/mask.txt",),
        make=write_config_without_type, value=masked, right=masked_by_transformers,
    ),
    "special-tokens-named-in-tokenizer-config": Case(
        make=write_named_special_tokens, value=lambda place: TextTokenizer.from_file(str(place.out)).mask_id, right=4
    ),
    "hf-data-set-with-configurations": Case(
        (f"prepare {MLM} --data.train_files hf:{{case}}/set",), 2, r"error: (?=.*big-v1).*small-v1"
    ),
    "hf-data-set-of-one-configuration": Case(
        (f"fit {MLM} --data.train_files {SMALL_SET} --data.val_files {SMALL_SET}",),
        says=r"train +90 documents",
    ),
    "rouge-lsum": Case(
        value=lambda _: rouge(
            ["The boat was late.\nMira met Jonas.\nThey bought a lamp at the market."],
            [["Mira met Jonas at the market.\nThey bought a lamp.\nThe boat was late."]],
        )["rougeLsum"],
        right=pytest.approx(100.0),
    ),
}  # fmt: skip
SAME_FOLDER = {
    "lists-as-text": "multi-hot-labels",
    "null-text-in-parquet": "null-text",
    "words-with-a-no-break-space": "words-with-a-space-in-tab-separated-columns",
    "hf-data-set-of-one-configuration": "hf-data-set-with-configurations",
}
"""Cases that share their inputs with another one."""


@pytest.mark.parametrize("name", CASE)
def test_case(name, tmp_path):
    case, place = CASE[name], Place(CASES / SAME_FOLDER.get(name, name), tmp_path)
    if case.make is not None:
        case.make(place)
    for number, command in enumerate(case.commands, start=1):
        done = run(shlex.split(command.format(case=place.case, out=place.out)))
        place.done.append(done)
        assert done.returncode == (case.code if number == len(case.commands) else 0), done.stderr[-2000:]
        assert "Traceback" not in done.stderr
    if case.says:
        assert re.search(case.says, place.done[-1].stderr), place.done[-1].stderr[-2000:]
    if case.code == 2:
        assert len([line for line in place.done[-1].stderr.splitlines() if line.startswith("error: ")]) == 1
    if case.value is not None:
        assert case.value(place) == (case.right(place) if callable(case.right) else case.right)


def test_every_folder_of_a_case_is_used():
    assert {path.name for path in CASES.iterdir() if path.is_dir()} <= {SAME_FOLDER.get(name, name) for name in CASE}
