"""The tasks of labels, trained through the command line's own code on small made-up sets."""

import html
import json
import re
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from seqeval.metrics.v1 import precision_recall_fscore_support
from seqeval.scheme import IOB2
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_f1_score, multilabel_exact_match, multilabel_f1_score

from leanbert.cli.app import CLI, quiet_libraries
from leanbert.data.samples.synthetic import synthetic_roles
from leanbert.data.token_labels import SemanticRoleData, TokenLabelData
from leanbert.errors import UserError
from leanbert.tasks import labelling
from leanbert.tasks.classification import METRICS, TextClassification, multilabel_scores
from leanbert.tasks.labelling import Labelling
from leanbert.tasks.tagging import (
    SemanticRoleLabelling,
    TokenClassification,
    bracketed,
    sentences_of,
)
from tests.training import scalars

TINY = [
    "--model.encoder.num_layers=2", "--model.encoder.hidden_size=32", "--model.encoder.num_heads=2",
    "--data.max_length=48", "--data.vocab_size=400", "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.precision=32-true",
]  # fmt: skip


def run(folder, subcommand, config, *arguments, overlays=()):
    quiet_libraries()
    configs = [f"configs/{config}.yaml", *(f"configs/memory/{name}.yaml" for name in overlays)]
    return CLI(
        [subcommand, *(f"--config={path}" for path in configs), *TINY, f"--data.cache_dir={folder / 'cache'}",
         f"--trainer.default_root_dir={folder / 'runs'}", *arguments]
    )  # fmt: skip


def roles(folder, steps, *arguments, **more):
    paths = {part: folder / f"{part}.jsonl" for part in ("train", "val")}
    for part, path in paths.items():
        records = synthetic_roles(train=200, val=40, test=1)[part]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    files = [f"--data.{part}_files={path}" for part, path in paths.items()]
    return run(folder, "fit", "srl", *files, f"--trainer.max_steps={steps}", "--data.batch_size=8", *arguments, **more)


def texts(folder, steps, *arguments, subcommand="fit", **more):
    for part, words in (("train", ("good", "fine", "bad", "poor")), ("val", ("good", "poor"))):
        records = [
            {"text": f"{word} film number {n}", "label": "pos" if word in ("good", "fine") else "neg"}
            for n in range(12)
            for word in words
        ]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = [f"--data.{part}_files={folder / part}.jsonl" for part in ("train", "val")]
    steps = f"--trainer.max_steps={steps}"
    return run(folder, subcommand, "classification", *files, steps, "--data.batch_size=4", *arguments, **more)


def test_texts_are_learnt_and_answers_come_in_order(tmp_path, capsys):
    values = scalars(texts(tmp_path, 60, "--model.schedule.warmup_steps=5", "--model.optimizer.lr=0.01"))
    assert values["val/accuracy"][60] == 1.0
    assert values["val/loss"][60] < 0.5 * values["val/loss"][0]
    (tmp_path / "in.txt").write_text("a bad film\na fine film\n")
    run(tmp_path, "predict", "classification", "--ckpt_path=best", f"--data.predict_files={tmp_path / 'in.txt'}")
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(answer["text"], answer["label"]) for answer in answers] == [("a bad film", "neg"), ("a fine film", "pos")]


@pytest.mark.slow
def test_texts_are_planned_validation_included(tmp_path, capsys):
    trained = texts(tmp_path, 1)
    texts(tmp_path, 1, f"--json={tmp_path / 'plan.json'}", subcommand="plan")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["parameters"] == trained.model.model.num_parameters
    assert plan["by_phase"]["validation"] > 0


def test_roles_are_learnt_and_predicates_found(tmp_path, capsys):
    fast = ["--model.schedule.warmup_steps=5", "--model.optimizer.lr=0.01", "--model.optimizer.matrix_lr=0.05"]
    values = scalars(roles(tmp_path, 80, "--trainer.val_check_interval=80", *fast))
    assert values["val/f1"][80] > 0.5 > values["val/f1"][0]
    assert values["val/predicate_f1"][80] > 0.5
    (tmp_path / "in.jsonl").write_text('{"tokens": ["The", "cook", "helps", "."], "predicate": 2}\n')
    run(tmp_path, "predict", "srl", "--ckpt_path=last", f"--data.predict_files={tmp_path / 'in.jsonl'}")
    (answer,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert (answer["predicate"], len(answer["labels"])) == (2, 4)


def test_without_predicates_to_find_none_are_counted(tmp_path):
    values = scalars(roles(tmp_path, 1, "--data.find_predicates=false"))
    assert "val/f1" in values
    assert "val/predicate_f1" not in values


def test_a_resumed_run_has_the_same_losses(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    schedule = "--model.schedule.name=constant"
    whole = scalars(texts(tmp_path / "whole", 8, schedule))["train/loss"]
    texts(tmp_path / "parts", 3, schedule)
    resumed = scalars(texts(tmp_path / "parts", 8, schedule, "--ckpt_path=last"))["train/loss"]
    assert [resumed[step] for step in range(4, 9)] == pytest.approx([whole[step] for step in range(4, 9)], rel=1e-6)


@pytest.mark.parametrize("overlays", [("accumulation",), ("checkpointing", "chunked_head"), ("layer_major",)])
def test_exact_techniques_change_no_loss(tmp_path, overlays):
    (tmp_path / "plain").mkdir()
    (tmp_path / "other").mkdir()
    more = ["--model.encoder.dropout=0.0", "--data.batch_size=16", "--model.optimizer.name=adamw"]
    plain = scalars(roles(tmp_path / "plain", 3, *more))["train/loss"]
    other = scalars(roles(tmp_path / "other", 3, *more, overlays=overlays))["train/loss"]
    assert [other[step] for step in (1, 2, 3)] == pytest.approx([plain[step] for step in (1, 2, 3)], rel=1e-4)


def test_lean_trains_roles(tmp_path):
    values = scalars(roles(tmp_path, 4, overlays=("lean",)))
    assert values["train/loss"][4] < values["train/loss"][1]


def test_sampled_sentences_are_spelled_with_their_roles(tmp_path):
    cli = roles(tmp_path, 1, "--data.find_predicates=false")
    events = EventAccumulator(str(cli.trainer.log_dir)).Reload()
    table = events.Tensors("samples/labels/text_summary")[0].tensor_proto.string_val[0].decode()
    written = re.sub(r"\\(.)", r"\1", html.unescape(table))  # Markdown's escapes keep it as it is
    found = [line.removeprefix("| ").split(" | ")[0] for line in written.splitlines()[2:]]
    records = map(json.loads, (tmp_path / "val.jsonl").read_text().splitlines())
    assert len(found) == 12
    assert {text.lower() for text in found} <= {
        bracketed(record["tokens"], record["labels"]).lower() for record in records
    }


@pytest.mark.parametrize("problem", ["single", "multi", "regression"])
def test_the_criterion_is_that_of_torch(problem):
    torch.manual_seed(0)
    scores, task = torch.randn(2, 3, 4), Labelling()
    task.problem = problem
    if problem == "single":
        targets = torch.tensor([[0, 3, -100], [2, -100, 9]])  # 9: a label of evaluation only
        expected = F.cross_entropy(scores.flatten(0, 1)[:4][[0, 1, 3]], torch.tensor([0, 3, 2]), reduction="sum")
    else:
        targets = torch.randint(0, 2, (2, 3, 4)).float()
        targets[1, 1:] = torch.nan
        used, truth = scores[~targets.isnan()], targets[~targets.isnan()]
        loss = F.binary_cross_entropy_with_logits if problem == "multi" else F.mse_loss
        expected = loss(used, truth, reduction="sum")
    assert task.criterion(scores, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_documents_of_packed_rows_come_apart():
    guesses, truths = torch.tensor([[1, 2, 3, -100]]), torch.tensor([[4, 5, 6, -100]])
    documents = torch.tensor([[0, 1, 1, -1]])
    assert list(sentences_of(guesses, truths, documents)) == [([1], [4], []), ([2, 3], [5, 6], [])]
    cut = [[[], [7], [8]]]  # of the last document no word did fit
    found = list(sentences_of(guesses, truths, documents, cut))
    assert found == [([1], [4], []), ([2, 3], [5, 6], [7]), ([], [], [8])]


def test_spans_in_brackets():
    labels = ["B-ARG0", "I-ARG0", "B-V", "O"]
    assert bracketed(["The", "cook", "eats", "."], labels) == "[ARG0 The cook] [V eats] ."


def scores_of_a_perfect_model(monkeypatch, task, data, part="val"):
    """Return what a task says of a model that gives each word that it reads its true tag."""
    monkeypatch.setattr(type(task), "_data", data)
    task.model = SimpleNamespace(labels=data.labels)
    task.build_metrics()
    batch = data.evaluation_rows(part)[np.arange(data.packing(part).rows)]
    sure = F.one_hot(batch.targets.clamp(min=0), len(data.names(part)))[..., : len(data.labels)].float()
    return task.evaluate(part, [task.kept(sure, batch)])


def word_data(folder, kind, records, **settings):
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    file = str(folder / "a.jsonl")
    data = kind(train_files=file, val_files=file, vocab_size=60, cache_dir=str(folder / "cache"), **settings)
    data.setup("fit")
    return data


@pytest.mark.parametrize("length", [8, 10, 32])
def test_spans_of_words_that_were_cut_count_as_missed(tmp_path, monkeypatch, capsys, length):
    random = Random(5)
    records = []
    for _ in range(30):
        words = random.randint(1, 14)
        tags = ["O"]
        for _ in range(words):
            inside = [f"I-{tags[-1][2:]}"] if tags[-1] != "O" else []
            tags.append(random.choice(["O", "B-X", "B-Y", *inside, *inside]))
        records.append({"tokens": random.choices("abcdefg", k=words), "labels": tags[1:]})
    data = word_data(tmp_path, TokenLabelData, records, max_length=length)
    found = scores_of_a_perfect_model(monkeypatch, TokenClassification(), data)
    read = length - 2  # one piece a word, [CLS] and [SEP]
    gold = [record["labels"] for record in records]
    guess = [tags[:read] + ["O"] * len(tags[read:]) for tags in gold]
    expected = precision_recall_fscore_support(gold, guess, average="micro", scheme=IOB2, mode="strict")
    assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx(expected[:3])
    cut = sum(len(tags[read:]) for tags in gold)
    assert found.get("cut_words", 0) == cut
    assert (found["f1"] == 1.0) == (cut == 0) == (length == 32)
    told = f"data.val_files: {cut} words of them are not read: their spans count as missed"
    assert (told in capsys.readouterr().err.splitlines()) == (cut > 0)


def test_arguments_of_words_that_were_cut_count_as_missed(tmp_path, monkeypatch):
    tokens = list("abcdefgh")
    labels = ["B-A0", "B-V", "B-A1", "I-A1", "O", "O", "B-A2", "I-A2"]
    record = {"tokens": tokens, "predicate": 1, "labels": labels}
    data = word_data(tmp_path, SemanticRoleData, [record], max_length=9, find_predicates=False)
    found = scores_of_a_perfect_model(monkeypatch, SemanticRoleLabelling(), data)
    assert (found["f1"], found["precision"], found["recall"]) == pytest.approx((0.8, 1.0, 2 / 3))
    assert found["f1_role/(other roles)"] == 0.0  # A2 is in no word that training reads
    assert found["cut_words"] == 3
    labels[4:] = ["O", "O", "O", "B-C-A1"]  # a piece of A1 that was cut: the argument is not whole
    data = word_data(tmp_path, SemanticRoleData, [record], max_length=9, find_predicates=False)
    found = scores_of_a_perfect_model(monkeypatch, SemanticRoleLabelling(), data)
    assert (found["f1"], found["f1_role/A1"]) == (0.5, 0.0)


def test_a_rank_without_sentences_or_texts_evaluates_too(tmp_path, monkeypatch, recwarn):
    records = [
        {"tokens": ["a"], "predicate": 0, "labels": ["B-V"]},
        {"tokens": ["b", "a"], "predicate": 1, "labels": ["B-A", "B-V"]},
    ]
    data = word_data(tmp_path, SemanticRoleData, records, max_length=8)
    monkeypatch.setattr(SemanticRoleLabelling, "_data", data)
    task = SemanticRoleLabelling()
    task.model = SimpleNamespace(labels=data.labels)
    task.build_metrics()
    assert task.evaluate("val", [])["f1"] == 0.0
    argument, verb = map(data.labels.index, ("B-A", "B-V"))
    kept = [([argument, verb], [argument, verb], [])]  # of the other rank
    monkeypatch.setattr(labelling, "over_ranks", lambda own: [*own, kept])
    task.sums.add(loss=torch.ones(1), targets=torch.ones(2))
    assert task.metrics_of("val")["f1"] == 1.0
    texts_task = TextClassification()
    texts_task.model = SimpleNamespace(labels=["x", "y"])
    texts_task.build_metrics()
    there = (torch.tensor([0, 1]), torch.tensor([0, 0]))
    monkeypatch.setattr(labelling, "over_ranks", lambda own: [*own, there])
    texts_task.sums.add(loss=torch.ones(1), targets=torch.ones(2))
    found = texts_task.metrics_of("val")
    assert (found["loss"], found["accuracy"]) == (0.5, 0.5)
    assert not recwarn.list


@pytest.mark.parametrize("labels", [1, 4])
def test_scores_of_several_labels_are_those_of_torchmetrics(labels):
    torch.manual_seed(0)
    guesses, truths = torch.rand(50, labels) > 0.6, torch.rand(50, labels) > 0.5
    guesses[:, 3:], truths[:, 3:] = False, False  # a label that nobody gives
    found = multilabel_scores(guesses, truths)
    if labels == 1:  # which torchmetrics refuses
        expected = {"f1": binary_f1_score(guesses[:, 0].long(), truths[:, 0].long())}
        expected |= {"f1_macro": expected["f1"], "accuracy": (guesses == truths).float().mean()}
    else:
        given = (guesses.long(), truths.long(), labels)
        expected = {
            f"f1{'_macro' * (kind == 'macro')}": multilabel_f1_score(*given, average=kind)
            for kind in ("micro", "macro")
        }
        expected["accuracy"] = multilabel_exact_match(*given)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}
    )


def test_a_resumed_run_numbers_labels_as_its_checkpoint_does(tmp_path, capsys):
    fast = ["--model.optimizer.lr=0.01", "--model.schedule.name=constant", "--trainer.val_check_interval=40"]
    texts(tmp_path, 40, *fast)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    files = [f"--data.{part}_files={tmp_path / part}.jsonl" for part in ("train", "val")]
    again = [*files, *fast, "--data.batch_size=4"]
    more = ["--ckpt_path=last", "--trainer.max_steps=41"]
    values = scalars(run(tmp_path, "fit", "classification", *again, *more, "--data.max_length=64"))
    assert values["val/accuracy"][41] == 1.0
    assert "data.max_length: 48, as the model was trained, not 64" in capsys.readouterr().err
    start = [f"--model.init_from={last(tmp_path)}", "--trainer.max_steps=1"]
    values = scalars(run(tmp_path, "fit", "classification", *again, *start))
    assert values["val/accuracy"][0] == 1.0  # the head is that of before
    path.write_text(path.read_text() + '{"text": "a film", "label": "odd"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl:49: label 'odd' is not among the 2 of the model \(pos, neg\)"):
        run(tmp_path, "fit", "classification", *again, *more)
    capsys.readouterr()
    run(tmp_path, "validate", "classification", files[1], "--ckpt_path=last")  # training files are not read
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert answers[-1]["val/accuracy"] == 1.0


def last(folder):
    """Return the newest checkpoint of the newest run."""
    runs = sorted(
        (folder / "runs" / "classification").iterdir(), key=lambda path: int(path.name.removeprefix("version_"))
    )
    return max((runs[-1] / "checkpoints").glob("step-*.ckpt"))


@pytest.mark.parametrize("problem", list(METRICS))
def test_metrics_of_texts_are_known_before_anything_is_read(problem):
    task, data = TextClassification(), SimpleNamespace(hparams={"problem": problem})
    task.problem, task.model = problem, SimpleNamespace(labels=["a", "b"])
    targets = torch.tensor([0, 1, 1]) if problem == "single" else torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.5]])
    assert set(task.evaluate("val", [(targets, targets)])) == set(METRICS[problem])
    for name in ("loss", "of a callback", *METRICS[problem]):
        task.check_monitor(f"val/{name}", data)
    other = "spearman" if problem != "regression" else "accuracy"
    with pytest.raises(UserError) as error:
        task.check_monitor(f"val/{other}", data)
    assert str(error.value) == (
        f"checkpoint.monitor: val/{other} is not logged where data.problem is {problem}. "
        f"Choose {', '.join(f'val/{name}' for name in ('loss', *METRICS[problem]))}."
    )
