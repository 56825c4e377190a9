"""Sequence to sequence, trained through the command line's own code on 32 made-up pairs."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leanbert.cli.app import CLI, quiet_libraries
from leanbert.errors import UserError
from leanbert.messages import say_once
from leanbert.models.config import EncoderConfig
from leanbert.models.stored import ModelMetadata, Stored
from leanbert.tasks.seq2seq import Seq2Seq, special_tokens
from tests.training import scalars

WORDS = ["Red", "old", "cook", "guest", "cake", "gives", "eats", "Dog"]


def made_up_pairs(count=32):
    """Different sources of 1 to 5 words, each with a target of 1 to 4 that does not follow from it."""
    chance, pairs = random.Random(0), {}
    while len(pairs) < count:
        source, target = (" ".join(chance.choices(WORDS, k=chance.randint(1, most))) for most in (5, 4))
        pairs.setdefault(source, target)
    return list(pairs.items())


PAIRS = made_up_pairs()


def run(folder, subcommand, *arguments):
    quiet_libraries()
    file = folder / "pairs.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in PAIRS))
    return CLI(
        [subcommand, "--config=configs/translation.yaml", "--model.encoder.num_layers=2",
         "--model.encoder.hidden_size=64", "--model.encoder.num_heads=2", "--model.encoder.dropout=0.0",
         "--model.optimizer.name=adamw", "--model.optimizer.lr=0.005", "--model.schedule.warmup_steps=5",
         f"--data.train_files={file}", f"--data.val_files={file}", f"--data.test_files={file}",
         "--data.vocab_size=300", "--data.max_length=64", "--data.batch_size=3", "--data.val_batch_size=2",
         f"--data.cache_dir={folder / 'cache'}", "--trainer.log_every_n_steps=1", "--trainer.callbacks=[]",
         "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.precision=32-true",
         f"--trainer.default_root_dir={folder / 'runs'}", *arguments]
    )  # fmt: skip


def answers_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that has learnt all pairs, and its command line."""
    folder = tmp_path_factory.mktemp("seq2seq")
    return folder, run(folder, "fit", "--trainer.max_steps=120", "--trainer.val_check_interval=120")


def test_all_pairs_are_learnt_and_answered_in_order(trained, capsys):
    folder, _ = trained
    (folder / "in.txt").write_text("".join(f"{source}\n" for source, _ in PAIRS))
    run(folder, "predict", "--ckpt_path=last", f"--data.predict_files={folder / 'in.txt'}",
        "--model.generation.beams=1", "--data.batch_size=5")  # fmt: skip
    answers = answers_of(capsys)
    assert [list(answer) for answer in answers] == [["source", "output", "score"]] * 32
    assert [(answer["source"], answer["output"]) for answer in answers] == PAIRS
    assert all(-0.5 < answer["score"] < 0.0 for answer in answers)


def test_validation_logs_quality_and_the_loss_without_smoothing(trained):
    _, cli = trained
    values = scalars(cli)
    assert values["val/bleu"][0] < 5.0 < values["val/bleu"][120] == pytest.approx(100.0)
    assert values["val/chrf"][120] == pytest.approx(100.0)
    assert values["val/loss"][120] < 0.2 < values["train/loss"][120]  # smoothed by 0.1 it cannot be 0
    assert values["val/perplexity"][120] == pytest.approx(2.71828182 ** values["val/loss"][120], rel=1e-4)
    events = EventAccumulator(str(cli.trainer.log_dir))
    events.Reload()
    found = events.Tensors("samples/outputs/text_summary")
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in found}
    assert list(texts) == [0, 120]
    first, _, *rows = texts[120].splitlines()
    longest = sorted(PAIRS, key=lambda pair: -len(pair[0]))[:12]
    assert first == "| source | reference | output |"
    assert rows == [f"| {source} | {target} | {target} |" for source, target in longest]


def test_test_searches_as_set_and_gives_the_signature(trained, capsys):
    folder, _ = trained
    say_once.cache_clear()
    run(folder, "test", "--ckpt_path=best", "--model.quality=bleu")
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["test/bleu"] == pytest.approx(100.0)
    assert "BLEU is sacreBLEU's: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp" in err
    run(folder, "test", "--ckpt_path=best", "--model.quality=rouge", "--model.generation.length_ratio=0",
        "--model.generation.length_more=1")  # fmt: skip
    out, err = capsys.readouterr()
    metrics = json.loads(out.splitlines()[-1])
    assert {
        "test/rouge1",
        "test/rouge2",
        "test/rougeL",
        "test/rougeLsum",
        "test/loss",
        "test/perplexity",
    } <= metrics.keys()
    assert 0.0 < metrics["test/rouge1"] < 90.0  # outputs of one token
    assert "sacreBLEU" not in err
    assert "ROUGE is rouge-score's, without stemming, tokens: auto" in err


def test_a_copying_run_stops_goes_on_and_answers(tmp_path, capsys):
    """Targets are their sources, which a pointer learns at once."""
    words = [*WORDS, "table", "rain"]
    lines = [" ".join(random.Random(seed).sample(words, 3)) for seed in range(96)]
    file = tmp_path / "same.jsonl"
    file.write_text("".join(json.dumps({"source": line, "target": line}) + "\n" for line in lines))
    settings = ["--model.copy=true", *(f"--data.{part}_files={file}" for part in ("train", "val", "test"))]
    run(tmp_path, "fit", *settings, "--trainer.max_steps=30", "--trainer.val_check_interval=30")
    cli = run(tmp_path, "fit", *settings, "--trainer.max_steps=60", "--trainer.val_check_interval=30",
              "--ckpt_path=last")  # fmt: skip
    values = scalars(cli)
    assert values["val/chrf"][0] < 30.0 < 99.0 < values["val/chrf"][60]
    assert values["train/loss"][60] < 0.1  # which is not smoothed
    capsys.readouterr()
    (tmp_path / "in.txt").write_text("cake cook rain\n")
    run(tmp_path, "predict", "--ckpt_path=last", f"--data.predict_files={tmp_path / 'in.txt'}")
    assert answers_of(capsys)[0]["output"] == "cake cook rain"
    with pytest.raises(UserError, match=r"^model\.copy: the model at .* has a pointer\. Set it to true$"):
        run(tmp_path, "fit", f"--model.init_from={last_checkpoint(cli)}", *settings[1:], "--trainer.max_steps=1")
    with pytest.raises(UserError, match=r"^model\.copy: sources and targets have their own tokenizers\."):
        run(tmp_path, "fit", *settings, "--data.target_tokenizer=train", "--trainer.max_steps=1")


def last_checkpoint(cli):
    return max(Path(cli.trainer.log_dir, "checkpoints").glob("step-*.ckpt"))


def test_a_run_resumed_within_an_epoch_has_the_same_losses(tmp_path):
    settings = ["--model.schedule.name=constant", "--model.schedule.warmup_steps=0", "--data.batch_size=1",
                "--model.validation_sources=0", "--model.encoder.dropout=0.1"]  # fmt: skip
    losses, values = {}, {}
    for name, steps in (("whole", (7,)), ("parts", (4, 7))):
        (tmp_path / name).mkdir()
        for number, most in enumerate(steps):
            more = ["--ckpt_path=last"] if number else []
            cli = run(tmp_path / name, "fit", f"--trainer.max_steps={most}", *settings, *more)
        assert cli.datamodule.batches_per_epoch == 3
        values[name] = scalars(cli)
        losses[name] = [values[name]["train/loss"][step] for step in range(1, 8)]
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-6)
    assert values["parts"]["val/loss"][7] == pytest.approx(values["whole"]["val/loss"][7], rel=1e-6)
    assert not any(tag in values["whole"] for tag in ("val/bleu", "val/chrf"))
    assert len(set(losses["whole"])) == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, r"^model\.label_smoothing: 1\.0 is out of range\. Give .* from 0 to below 1\.$"),
        ({"label_smoothing": -0.1}, r"^model\.label_smoothing: -0\.1 is out of range\."),
        (
            {"label_smoothing": 0.1, "copy": True},
            r"^model\.label_smoothing: 0\.1 would spread .* Leave it out$",
        ),
        ({"decoder_layers": 0}, r"^model\.decoder_layers: 0 is out of range\. Give a whole number, 1 or more\.$"),
        (
            {"validation_sources": -1},
            r"^model\.validation_sources: -1 is out of range\. Give a whole number, 0 or more\.$",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        Seq2Seq(**settings)


@pytest.mark.parametrize(
    ("own", "there", "message"),
    [
        ({}, {"decoder_layers": 3}, None),  # by default as many as the encoder has
        (
            {"decoder_layers": 2},
            {"decoder_layers": 3},
            r"^model\.decoder_layers: is 2, but the checkpoint has 3\.",
        ),
        ({}, {"decoder_layers": 2}, r"^model\.decoder_layers: is 3, but the checkpoint has 2\."),
        ({"copy": True}, {"copy": True}, None),
        ({"copy": True}, {}, r"^model\.copy: is True, but the checkpoint has False\."),
        ({}, {"copy": True}, r"^model\.copy: is False, but the checkpoint has True\."),
        ({"decoder_start": "random"}, {"decoder_start": "encoder"}, None),  # only where training began
        ({"decoder_start": "shared"}, {"decoder_start": "random"}, r"^model\.decoder_start: is shared, but the check"),
        ({"decoder_start": "encoder"}, {"decoder_start": "shared"}, r"^model\.decoder_start: is encoder, but the che"),
    ],
)
def test_a_run_goes_on_with_the_same_decoder_only(own, there, message):
    encoder = EncoderConfig(num_layers=3, hidden_size=32, num_heads=2)
    stored = Stored(encoder.resolved(), ModelMetadata("seq2seq", **there), Path("a.ckpt"), dict)
    task = Seq2Seq(encoder=encoder, **own)
    if message is None:
        task.check_resumable(stored)
    else:
        with pytest.raises(UserError, match=message):
            task.check_resumable(stored)


@pytest.mark.parametrize("template", [([], [3]), ([2], [])])
def test_a_tokenizer_without_begin_or_end_is_refused(template):
    with pytest.raises(UserError, match=r"^data\.tokenizer: puts no token before or after a text: nothing to begin"):
        special_tokens(SimpleNamespace(template=template))


def test_of_long_sources_tensorboard_shows_the_beginning():
    task = Seq2Seq()
    task._shown = [("cake " * 99, "cake", "guest"), ("short", "a", "b")]
    _, _, long, short = task.samples(None)["samples/outputs"].splitlines()
    assert long == f"| {'cake ' * 47}... | cake | guest |"
    assert short == "| short | a | b |"


def test_outputs_hold_no_special_token_but_the_end():
    tokenizer = SimpleNamespace(template=([7, 2], [3, 8]), special_ids=[0, 2, 3, 7, 8])
    assert special_tokens(tokenizer) == (7, 8, [0, 2, 3, 7])
