"""The tasks of labels, trained through the command line's own code on small made-up sets."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from leanbert.cli import CLI, quiet_libraries
from leanbert.data.synthetic import synthetic_roles
from leanbert.tasks.labelling import Labelling
from leanbert.tasks.tagging import bracketed, sentences_of
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


def texts(folder, steps, *arguments, **more):
    for part, words in (("train", ("good", "fine", "bad", "poor")), ("val", ("good", "poor"))):
        records = [
            {"text": f"{word} film number {n}", "label": "pos" if word in ("good", "fine") else "neg"}
            for n in range(12)
            for word in words
        ]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = [f"--data.{part}_files={folder / part}.jsonl" for part in ("train", "val")]
    return run(
        folder,
        "fit",
        "classification",
        *files,
        f"--trainer.max_steps={steps}",
        "--data.batch_size=4",
        *arguments,
        **more,
    )


def test_texts_are_learnt_and_answers_come_in_order(tmp_path, capsys):
    values = scalars(texts(tmp_path, 60, "--model.schedule.warmup_steps=5", "--model.optimizer.lr=0.01"))
    assert values["val/accuracy"][60] == 1.0
    assert values["val/loss"][60] < 0.5 * values["val/loss"][0]
    (tmp_path / "in.txt").write_text("a bad film\na fine film\n")
    run(tmp_path, "predict", "classification", "--ckpt_path=best", f"--data.predict_files={tmp_path / 'in.txt'}")
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(answer["text"], answer["label"]) for answer in answers] == [("a bad film", "neg"), ("a fine film", "pos")]


def test_roles_are_learnt_and_predicates_found(tmp_path, capsys):
    fast = ["--model.schedule.warmup_steps=5", "--model.optimizer.lr=0.01", "--model.optimizer.matrix_lr=0.05"]
    values = scalars(roles(tmp_path, 80, "--trainer.val_check_interval=80", *fast))
    assert values["val/f1"][80] > 0.5 > values["val/f1"][0]
    assert values["val/predicate_f1"][80] > 0.5
    (tmp_path / "in.jsonl").write_text('{"tokens": ["The", "cook", "helps", "."], "predicate": 2}\n')
    run(tmp_path, "predict", "srl", "--ckpt_path=last", f"--data.predict_files={tmp_path / 'in.jsonl'}")
    (answer,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert (answer["predicate"], len(answer["labels"])) == (2, 4)


def test_without_predicates_to_find_none_are_counted(tmp_path, recwarn):
    values = scalars(roles(tmp_path, 1, "--data.find_predicates=false"))
    assert "val/f1" in values
    assert "val/predicate_f1" not in values
    assert not [warning for warning in recwarn if "SpanCounts" in str(warning.message)]


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
    found = [line.removeprefix("| ").split(" | ")[0] for line in table.splitlines()[2:]]
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
    assert list(sentences_of(guesses, truths, documents)) == [([1], [4]), ([2, 3], [5, 6])]


def test_spans_in_brackets():
    labels = ["B-ARG0", "I-ARG0", "B-V", "O"]
    assert bracketed(["The", "cook", "eats", "."], labels) == "[ARG0 The cook] [V eats] ."
