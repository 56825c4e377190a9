"""Numbers computed again by others: ids, scores of words that were cut, ROUGE, BLEU, and what a plan foretells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .forks import Process, fresh
from .mutations import guarded
from .samples import TASKS, command_of, write_samples
from .trained import base_of, done_well

VOCABULARY = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
    *("the", "The", "boat", "lamp", "über", "uber", "Über", "grün", "grun", "東", "京", "東京"), *".,-é", "e\u0301",
)  # fmt: skip
TEXTS = (
    "the boat", "The Boats, the lamp.", "Über grün uber", "東京 the 東", "the [MASK] boat[MASK]", "zorblax the-zorblax",
    "e\u0301 é", "  the\u00a0boat\u200b ", "[SEP] the [UNK]", "x" * 120, "", "the\tboat\nlamp",
)  # fmt: skip
MIXED = {"tokenizer_class": "BertTokenizer"}
LATIN = ["the old boat is green", "a lamp near the river", "the cook sold a fine old boat today"]
SCRIPTS = {  # outputs and references; the tokenisation of BLEU, in which sacrebleu counts them
    "Latin": (LATIN, ["the old boat was green", "one lamp by the river", "the cook sold the fine boat today"], "13a"),
    "Cyrillic": (["тихий рынок прячет дом", "река и зима"], ["тихий рынок хранит дом", "река и лето"], "13a"),
    "Devanagari": (["नदी बहती है और नाव", "घर में दीपक है"], ["नदी बहती है पर नाव", "घर में दीपक था"], "13a"),
    "Chinese": (["山水月日风花雪夜。", "家书车门马鱼鸟。"], ["山水月日风花雪家。", "家书车门马鱼鸟山。"], "zh"),
    "umlauts": (["die brücke ist grün und schön"], ["die brücke ist kühn und schön"], "char"),
}  # fmt: skip
PLANNED = {"mlm": 0.02, "classification": 0.02}
"""Tasks, and the error of the plan's peak that is allowed."""


def experiments(count: int, seed: int) -> list[dict[str, Any]]:
    """Return what is computed again."""
    named = [("ids", name) for name in FOLDERS]
    named += [("F1 with cut words", f"{task} {length}") for task in ("tagging", "srl") for length in (8, 11)]
    named += [(score, script) for score in ("ROUGE", "BLEU") for script in SCRIPTS]
    named += [("plan with init_from", task) for task in PLANNED]
    return [{"kind": kind, "name": name} for kind, name in named]


def run(experiment: dict[str, Any], work: Path) -> dict[str, Any]:
    """Return both numbers, and whether they differ."""
    folder = fresh(work / f"again-{experiment['number']}")
    folder.mkdir(parents=True)
    ours, theirs, allowed = KINDS[experiment["kind"]](experiment["name"], folder, work)
    if isinstance(ours, str) and ours.startswith("error: "):
        return {"ours": ours[:100], "theirs": str(theirs)[:100]}  # refused, with the reason
    same = ours == theirs if allowed == 0 else abs(ours - theirs) <= allowed
    return {"ours": str(ours)[:60], "theirs": str(theirs)[:60], "wrong": None if same else f"{ours} for {theirs}"[:400]}


# ---- ids


def _vocabulary(folder: Path, options: dict[str, Any], words: Sequence[str] = VOCABULARY, end: str = "\n") -> None:
    (folder / "vocab.txt").write_bytes("".join(f"{word}{end}" for word in words).encode())
    (folder / "tokenizer_config.json").write_text(json.dumps(MIXED | options))


def _json(
    folder: Path, options: dict[str, Any], model: str = "WordPiece", special: Sequence[str] = VOCABULARY[:5]
) -> Any:
    """Write and return a tokenizer of the library `tokenizers`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    places = {word: place for place, word in enumerate((*special, *VOCABULARY[5:]))}
    kinds: dict[str, Callable[[], Tokenizer]] = {
        "WordPiece": lambda: Tokenizer(models.WordPiece(places, unk_token=special[1])),
        "BPE": lambda: Tokenizer(models.BPE(unk_token=special[1])),
        "Unigram": lambda: Tokenizer(models.Unigram()),
    }  # fmt: skip
    found = kinds[model]()
    if model == "WordPiece":
        found.normalizer, found.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        found.decoder = decoders.WordPiece()
    elif model == "BPE":
        found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        found.train_from_iterator(
            LATIN, trainers.BpeTrainer(vocab_size=300, special_tokens=[*special], initial_alphabet=alphabet)
        )
    else:
        found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        found.train_from_iterator(
            LATIN, trainers.UnigramTrainer(vocab_size=60, special_tokens=[*special], unk_token=special[1])
        )
    found.add_special_tokens([*special])
    ends = [(token, found.token_to_id(token)) for token in special[2:4]]
    found.post_processor = processors.TemplateProcessing(single=f"{special[2]} $A {special[3]}", special_tokens=ends)
    found.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    given = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **options}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return found


def _added(folder: Path, **how: bool) -> None:
    from tokenizers import AddedToken

    tokenizer = _json(folder, {})
    tokenizer.add_tokens([AddedToken("zorblax", **how)])
    tokenizer.save(str(folder / "tokenizer.json"))


def _beside(folder: Path, name: str, content: Any) -> None:
    _vocabulary(folder, {"do_lower_case": True})
    (folder / name).write_text(json.dumps(content))


OTHER_NAMES = ("<PAD>", "<UNK>", "<BEG>", "<END>", "<BLANK>")
FOLDERS: dict[str, Callable[[Path], Any]] = {
    "lower case": lambda folder: _vocabulary(folder, {"do_lower_case": True}),
    "cased": lambda folder: _vocabulary(folder, {"do_lower_case": False}),
    "lower case with accents": lambda folder: _vocabulary(folder, {"do_lower_case": True, "strip_accents": False}),
    "cased without accents": lambda folder: _vocabulary(folder, {"do_lower_case": False, "strip_accents": True}),
    "Chinese words": lambda folder: _vocabulary(folder, {"tokenize_chinese_chars": False}),
    "never_split": lambda folder: _vocabulary(folder, {"never_split": ["the-zorblax"]}),
    "no options": lambda folder: _vocabulary(folder, {}),
    "added_tokens.json": lambda folder: _beside(folder, "added_tokens.json", {"zorblax": len(VOCABULARY)}),
    "special_tokens_map.json": lambda folder: _beside(folder, "special_tokens_map.json", {"mask_token": "[MASK]"}),
    "a token twice": lambda folder: _vocabulary(folder, {}, (*VOCABULARY[:9], "lamp", *VOCABULARY[9:])),
    "a blank line": lambda folder: _vocabulary(folder, {}, (*VOCABULARY[:9], "", *VOCABULARY[9:])),
    "a byte order mark": lambda folder: _vocabulary(folder, {}, ("\ufeff[PAD]", *VOCABULARY[1:])),
    "line ends of Windows": lambda folder: _vocabulary(folder, {}, end="\r\n"),
    "tokenizer.json": lambda folder: _json(folder, {}),
    "names of special tokens": lambda folder: _json(folder, {}, special=OTHER_NAMES),
    "byte-level BPE": lambda folder: _json(folder, {}, "BPE"),
    "Unigram": lambda folder: _json(folder, {}, "Unigram"),
    "added, whole words": lambda folder: _added(folder, single_word=True),
    "added, white space": lambda folder: _added(folder, lstrip=True, rstrip=True),
    "added, normalised": lambda folder: _added(folder, normalized=True),
}


def ids(name: str, folder: Path, work: Path) -> tuple[Any, Any, float]:
    """Return the ids of odd texts by a folder, here and in transformers."""
    FOLDERS[name](folder)

    def ours() -> None:
        from leanbert.data.tokenizers.tokenizer import TextTokenizer

        print(json.dumps([list(found) for found in TextTokenizer.from_file(".").encode_batch(list(TEXTS))]))

    def theirs() -> None:
        from transformers import AutoTokenizer

        print(json.dumps(AutoTokenizer.from_pretrained(".")(list(TEXTS))["input_ids"]))

    here, there = Process(guarded(ours), folder).wait(), Process(theirs, folder).wait()
    said = here.stdout or here.stderr.strip().splitlines()[-1]
    return (said if here.code else json.loads(said)), json.loads(there.stdout), 0.0


# ---- scores


def cut_words(name: str, folder: Path, work: Path) -> tuple[float, float, float]:
    """Return F1 as validation has it and as counted here, over all words, for a model that sees some only."""
    task, length = name.split()
    write_samples(folder)
    short = [
        f"--data.max_length={length}",
        f"--data.val_files={_training_file(task)}",
        "--trainer.limit_val_batches=1.0",
    ]
    more = ["--data.find_predicates=false"] if task == "srl" else []
    done_well(
        folder, command_of(task, "fit", "--trainer.max_steps=40", "--trainer.val_check_interval=40", *short, *more)
    )
    said = done_well(folder, command_of(task, "validate", "--ckpt_path=last", *short, *more)).stdout

    def answer() -> None:
        import leanbert

        model = leanbert.load(next(Path("runs").glob("*/version_0")))
        sentences = _gold(task, folder)
        found = model.tag([s["tokens"] for s in sentences]) if task == "tagging" else model.label_roles(
            [{"tokens": s["tokens"], "predicate": s["predicate"]} for s in sentences]
        )  # fmt: skip
        print(json.dumps([line["labels"] for line in found]))

    guesses = json.loads(Process(answer, folder).wait().stdout)
    right = guessed = true = 0
    for labels, sentence in zip(guesses, _gold(task, folder), strict=True):
        one, other = spans(labels), spans(sentence["labels"])
        right, guessed, true = right + len(one & other), guessed + len(one), true + len(other)
    return json.loads(said)["val/f1"], 2 * right / max(1, guessed + true), 1e-6


def _training_file(task: str) -> str:
    return TASKS[task].arguments[0].partition("=")[2]


def _gold(task: str, folder: Path) -> list[dict[str, Any]]:
    text = (folder / _training_file(task)).read_text()
    if task == "srl":
        return [json.loads(line) for line in text.splitlines()]
    blocks = [[line.split("\t") for line in block.splitlines()] for block in text.strip().split("\n\n")]
    return [{"tokens": [row[0] for row in rows], "labels": [row[1] for row in rows]} for rows in blocks]


def spans(labels: Sequence[str]) -> set[tuple[int, int, str]]:
    """Return (first word, end, type) of the spans of BIO tags, without those of the predicate."""
    found, start = set(), 0
    for place, label in enumerate([*labels, "O"]):
        if place and labels[place - 1] != "O" and not label.startswith("I-"):
            found.add((start, place, labels[start][2:]))
        if not label.startswith("I-"):
            start = place
    return {span for span in found if span[2] != "V"}


def rouge_again(name: str, folder: Path, work: Path) -> tuple[float, float, float]:
    """Return ROUGE-L here and by rouge-score, given the same tokens."""
    from rouge_score import rouge_scorer, tokenizers

    from leanbert.tasks.output_metrics import rouge

    outputs, wanted, _ = SCRIPTS[name]

    class Words(tokenizers.Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return [*text.replace("。", "")] if name == "Chinese" else text.split()

    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())
    theirs = [scorer.score(there, own)["rougeL"].fmeasure for own, there in zip(outputs, wanted, strict=True)]
    return rouge(outputs, [[text] for text in wanted])["rougeL"], 100 * sum(theirs) / len(theirs), 1e-3


def bleu_again(name: str, folder: Path, work: Path) -> tuple[float, float, float]:
    """Return BLEU here and by sacrebleu."""
    import sacrebleu

    from leanbert.tasks.output_metrics import bleu

    outputs, wanted, tokens = SCRIPTS[name]
    theirs = sacrebleu.corpus_bleu(outputs, [wanted], tokenize=tokens).score
    return bleu(outputs, [[text] for text in wanted], tokens), theirs, 1e-3


# ---- plans


def planned(task: str, folder: Path, work: Path) -> tuple[float, float, float]:
    """Return the peak of live tensors that a plan foretells for an imported model, and that of the run."""
    shutil.copytree(base_of(task, work).folder, folder, dirs_exist_ok=True)
    larger = ["--model.encoder.num_layers=8", "--model.encoder.hidden_size=256", "--model.encoder.num_heads=4"]
    more = ["--model.init_from=export", *larger, "--trainer.default_root_dir=started"]
    done_well(folder, command_of(task, "plan", *more, "--json=plan.json"))
    monitor = folder / "monitor.yaml"
    monitor.write_text(
        "trainer: {callbacks+: [{class_path: leanbert.callbacks.reporting.memory_monitor.MemoryMonitor}]}\n"
    )
    done_well(folder, command_of(task, "fit", *more, "--trainer.max_steps=3", f"--config={monitor}"))
    measured = json.loads(next(folder.glob("started/*/version_0/summary.json")).read_text())["peak_bytes"]
    foretold = json.loads((folder / "plan.json").read_text())["predicted_peak_bytes"]
    return foretold, measured, PLANNED[task] * measured


KINDS: dict[str, Callable[[str, Path, Path], tuple[Any, Any, float]]] = {
    "ids": ids,
    "F1 with cut words": cut_words,
    "ROUGE": rouge_again,
    "BLEU": bleu_again,
    "plan with init_from": planned,
}
