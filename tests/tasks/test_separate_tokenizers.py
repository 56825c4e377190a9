"""Separate tokenizers of sources and targets, from the command line to transformers and back."""

import json

import pytest
import torch
import transformers
import yaml

import leanbert
from leanbert.cli.app import CLI, quiet_libraries
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.planning.dry_run import dry_run
from tests.training import read_scalars as scalars

WORDS = ["the", "cook", "guest", "cake", "gives", "eats", "red", "old", "house", "dog", "cat"]
ASKED = ["the old cook gives the cake", "the dog", "cat eats guest"]
ENCODER = {"preset": "bert", "num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 48}
SEPARATE = {"target_tokenizer": "train", "target_vocab_size": 60}


def translated(text):
    """Words of letters that no source has: KUCOC for cook."""
    return " ".join(word[::-1].upper() for word in text.split())


def pairs():
    for number in range(40):
        text = " ".join(WORDS[(number * step + step) % len(WORDS)] for step in range(1, 7))
        yield {"source": text, "target": translated(text)}


def command(folder, subcommand, *more, model=None, data=None, kind="seq2seq.Seq2Seq", of="pairs.PairData"):
    settings = {
        "model": {"class_path": f"leanbert.tasks.{kind}", "init_args": model or {}},
        "data": {
            "class_path": f"leanbert.data.{of}",
            "init_args": {"train_files": str(folder / "train.jsonl"), "cache_dir": str(folder / "cache")}
            | {"vocab_size": 50, "lowercase": False, "max_length": 32, "batch_size": 4, **(data or {})},
        },
        "trainer": {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    }
    path = folder / f"{subcommand}.yaml"
    path.write_text(yaml.safe_dump(settings))
    quiet_libraries()
    return CLI([subcommand, f"--config={path}", *more])


def fit(folder, root, steps, *more, data=SEPARATE, **model):
    model = {"decoder_layers": 1, "generation": {"beams": 2, "length_more": 3}, "encoder": ENCODER, **model}
    command(
        folder, "fit", f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={root}", *more, model=model,
        data={"val_share": 0.2, **data},
    )  # fmt: skip
    return root / "seq2seq" / "version_0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs()))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Four steps; its best checkpoint then gets weights of a size at which every source has another output."""
    version = fit(folder, folder / "runs", 4, "--checkpoint.every_n_steps=2", "--checkpoint.keep=3")
    path = version / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for weight in checkpoint["state_dict"].values():
        weight += 0.2 * torch.randn(weight.shape, generator=generator)
    torch.save(checkpoint, path)
    return version


@pytest.fixture(scope="module")
def joint(folder):
    return fit(folder, folder / "joint", 2, data={})


def predict(folder, capsys, *more, data=None):
    (folder / "asked.txt").write_text("".join(f"{text}\n" for text in ASKED))
    capsys.readouterr()
    command(
        folder, "predict", f"--data.predict_files={folder / 'asked.txt'}",
        f"--trainer.default_root_dir={folder / 'runs'}", *more, data=data,
        model={"generation": {"beams": 2, "length_more": 3}},
    )  # fmt: skip
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def letters(tokenizer):
    return {letter for i in range(5, tokenizer.vocab_size) for letter in tokenizer.token(i)} - {"#"}


def test_each_side_has_a_tokenizer_trained_on_it_alone(run):
    source, target = (TextTokenizer.from_file(run / name) for name in ("tokenizer", "target_tokenizer"))
    assert letters(source) == set("".join(WORDS))
    assert letters(target) == set("".join(WORDS).upper())
    assert (source.vocab_size, target.vocab_size) == (50, 60)
    kept = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["leanbert"]
    assert (kept["tokenizer"], kept["target_tokenizer"]) == (source.to_json(), target.to_json())
    assert kept["model"]["target_vocab_size"] == 60
    model = leanbert.load(run)
    assert (model.tokenizer.to_json(), model.target_tokenizer.to_json()) == (source.to_json(), target.to_json())
    assert [tokens for _, tokens in model.model.token_tables] == [50, 60]


def test_one_tokenizer_is_stored_as_ever(joint):
    kept = torch.load(joint / "checkpoints" / "best.ckpt", weights_only=True)
    assert "target_tokenizer" not in kept["leanbert"]
    assert "target_vocab_size" not in kept["leanbert"]["model"]
    assert "model.decoder.embeddings.token.weight" not in kept["state_dict"]
    assert not (joint / "target_tokenizer").exists()
    found = letters(TextTokenizer.from_file(joint / "tokenizer"))
    assert {letter for letter in found if letter.islower()}
    assert {letter for letter in found if letter.isupper()}


@pytest.mark.parametrize("data", [{}, SEPARATE])
def test_a_run_and_an_export_answer_as_predict_does(run, folder, capsys, tmp_path, data):
    """Whether or not the settings say that there are two tokenizers."""
    expected = predict(folder, capsys, "--ckpt_path=best", data=data)
    assert [answer["source"] for answer in expected] == ASKED
    outputs = [answer["output"] for answer in expected]
    assert len(set(outputs)) == 3
    assert set("".join(outputs)) <= set("".join(WORDS).upper() + " #")
    leanbert.load(run).export(tmp_path)
    assert leanbert.load(run).translate(ASKED) == expected
    assert leanbert.load(tmp_path).translate(ASKED) == expected
    assert predict(folder, capsys, f"--model.init_from={tmp_path}", data=data) == expected


def test_transformers_generates_the_same_outputs(run, tmp_path):
    model = leanbert.load(run)
    model.export(tmp_path)
    theirs = transformers.EncoderDecoderModel.from_pretrained(tmp_path).eval()
    source = transformers.AutoTokenizer.from_pretrained(tmp_path)
    target = transformers.AutoTokenizer.from_pretrained(tmp_path / "target_tokenizer")
    for text in ASKED:
        encoded = source(text, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        found = theirs.generate(input_ids=ids, attention_mask=mask, num_beams=1, max_new_tokens=2 * ids.shape[1] + 3)
        expected = model.translate([text], beams=1)[0]["output"]
        assert target.decode(found[0], skip_special_tokens=True) == expected != ""


def test_an_export_without_its_second_tokenizer_is_refused(run, tmp_path):
    leanbert.load(run).export(tmp_path)
    (tmp_path / "target_tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"the decoder has tokens of its own, but there is no target_tokenizer with"):
        leanbert.load(tmp_path)


@pytest.mark.parametrize("data", [{}, SEPARATE])
def test_training_goes_on_from_an_export(run, folder, tmp_path, data):
    leanbert.load(run / "checkpoints" / "step-00000004.ckpt").export(tmp_path / "start")
    again = fit(folder, tmp_path, 1, f"--model.init_from={tmp_path / 'start'}", data=data)
    assert scalars(again)["val/loss"][0] == pytest.approx(scalars(run)["val/loss"][4], abs=1e-5)


def test_a_resumed_run_is_the_whole_one(run, folder, tmp_path):
    again = fit(folder, tmp_path, 4, f"--ckpt_path={run / 'checkpoints' / 'step-00000002.ckpt'}")
    whole, resumed = (
        torch.load(each / "checkpoints" / "step-00000004.ckpt", weights_only=True)["state_dict"]
        for each in (run, again)
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    assert resumed["model.decoder.embeddings.token.weight"].shape == (64, 32)


def test_a_run_does_not_go_on_with_other_tokenizers(run, joint, folder, tmp_path):
    another = str(joint / "tokenizer")
    same = str(run / "target_tokenizer")
    for checkpoint, data, message in (
        (run, {}, "is not set, but the checkpoint has one of its own for targets. Set it to train"),
        (run, {"target_tokenizer": another}, f"{another} is another one than the checkpoint's. Set it to train"),
        (joint, SEPARATE, "is train, but the checkpoint has one tokenizer for sources and targets. Leave it out"),
    ):
        path = checkpoint / "checkpoints" / ("step-00000004.ckpt" if checkpoint is run else "step-00000002.ckpt")
        with pytest.raises(UserError) as caught:
            fit(folder, tmp_path, 5, f"--ckpt_path={path}", data=data)
        assert str(caught.value).startswith(f"data.target_tokenizer: {message}")
        assert "\n" not in str(caught.value)
    path = run / "checkpoints" / "step-00000004.ckpt"
    fit(folder, tmp_path, 5, f"--ckpt_path={path}", data={"target_tokenizer": same})


def test_an_encoder_of_one_language_learns_to_write_another(run, folder, tmp_path):
    """Its tokenizer stays; that of targets is trained, or that of another run."""
    text = tmp_path / "train.txt"
    text.write_text("".join(f"{pair['source']}\n\n" for pair in pairs()) * 5)
    command(
        folder, "fit", "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}", f"--data.train_files={text}",
        "--seed_everything=5",
        kind="mlm.MaskedLM", of="mlm.MaskedLMData", model={"encoder": ENCODER}, data={"vocab_size": 45},
    )  # fmt: skip
    start = tmp_path / "mlm" / "version_0" / "checkpoints" / "step-00000001.ckpt"
    begun = torch.load(start, weights_only=True)
    own = {
        "train": 60,
        str(run / "checkpoints" / "best.ckpt"): 60,
        str(start): begun["leanbert"]["encoder"]["vocab_size"],
    }
    for number, (target, tokens) in enumerate(own.items()):
        root = tmp_path / str(number)
        version = fit(folder, root, 1, f"--model.init_from={start}", data={**SEPARATE, "target_tokenizer": target})
        found = torch.load(version / "checkpoints" / "step-00000001.ckpt", weights_only=True)
        kept = found["leanbert"]
        assert kept["tokenizer"] == begun["leanbert"]["tokenizer"] != kept["target_tokenizer"] or number == 2
        assert (kept["encoder"]["vocab_size"], kept["model"]["target_vocab_size"]) == (own[str(start)], tokens)
        weight = "model.encoder.blocks.0.attention.qkv.weight"
        assert (found["state_dict"][weight] - begun["state_dict"][weight]).abs().max() < 0.03  # one step; else 0.1


def test_the_plan_knows_both_vocabularies(run, folder, monkeypatch):
    planned = []
    monkeypatch.setattr("leanbert.planning.command.run_plan", lambda settings, *_: planned.append(dry_run(settings, 2)))
    for data in (SEPARATE, {}):
        model = {"decoder_layers": 1, "encoder": ENCODER}
        command(folder, "plan", model=model, data={"val_share": 0.2, **data})
    separate, joint = (run.parameters for run in planned)
    assert separate == leanbert.load(run).model.num_parameters
    assert separate - joint == 60 * 32 + 60 - 50


def test_settings_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"^data\.target_vocab_size: 60, but sources and targets have one tokenizer\."):
        fit(folder, tmp_path, 1, data={"target_vocab_size": 60})
    with pytest.raises(UserError, match=r"^data\.target_tokenizer: nowhere does not exist\."):
        fit(folder, tmp_path, 1, data={"target_tokenizer": "nowhere"})
    bare = tmp_path / "tokenizer.json"
    tokenizer = json.loads(TextTokenizer.train(lambda: WORDS, vocab_size=60).to_json())
    bare.write_text(json.dumps({**tokenizer, "post_processor": None}))
    with pytest.raises(UserError, match=r"^data\.target_tokenizer: puts no token before or after a text"):
        fit(folder, tmp_path, 1, data={"target_tokenizer": str(bare)})
    with pytest.raises(UserError, match=r"^data\.tokenizer: puts no token before or after a text"):
        fit(folder, tmp_path, 1, data={"tokenizer": str(bare)})
