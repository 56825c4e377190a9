"""`leanbert.load` of each task: from a run, a checkpoint and an exported folder, the answers of `predict`."""

import json
import os
import re
import shutil

import pytest
import torch
import transformers
import yaml

import leanbert
from leanbert.api import Pretrained
from leanbert.cli.app import CLI, quiet_libraries
from leanbert.compression_report import variants
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.models.classifier import Classifier
from leanbert.models.config import EncoderConfig
from leanbert.models.packed_inputs import PackedInputs
from leanbert.models.stored import ModelMetadata
from leanbert.pretrained.build import build_model
from leanbert.units import format_size
from tests.training import read_scalars as scalars

WORDS = ["the", "a", "cook", "guest", "cake", "gives", "eats", "red", "old", "in", "of", "house", "dog", "cat"]
SENTENCE = ["the", "old", "cook", "gives", "a", "guest", "the", "red", "cake"]
ROLES = ["B-ARG0", "I-ARG0", "I-ARG0", "B-V", "B-ARG2", "I-ARG2", "B-ARG1", "I-ARG1", "I-ARG1"]

TASKS = {
    "mlm": ("mlm.MaskedLM", "mlm.MaskedLMData", {}, {}),
    "classification": (
        "classification.TextClassification",
        "classification.ClassificationData",
        {"threshold": 0.4},
        {"problem": "multi"},
    ),
    "tagging": ("tagging.TokenClassification", "words.TokenLabelData", {}, {}),
    "srl": ("tagging.SemanticRoleLabelling", "words.SemanticRoleData", {}, {"mark": "segments"}),
    "seq2seq": (
        "seq2seq.Seq2Seq",
        "pairs.PairData",
        {"decoder_layers": 1, "generation": {"beams": 2, "length_more": 3}},
        {},
    ),
}
ASKED = {
    "mlm": ["the [MASK] cook", "a [MASK] in the [MASK]"],
    "classification": ["the red cake", "a dog in the house", "guest"],
    "tagging": [" ".join(SENTENCE), "the dog"],
    "srl": [" ".join(SENTENCE), json.dumps({"tokens": SENTENCE, "predicate": 3})],
    "seq2seq": ["the old cook gives a guest the red cake", "the dog", "a cat sees"],
}
METHODS = {"mlm": "fill_mask", "classification": "classify", "tagging": "tag", "srl": "label_roles"} | {
    "seq2seq": "translate"
}
ONNX_FILES = ("model.onnx", "encoder_model.onnx", "decoder_model.onnx")


def records(task):
    for number in range(40):
        words = [WORDS[(number * step + step) % len(WORDS)] for step in range(1, 8)]
        text = " ".join(words)
        yield {
            "mlm": {"text": text},
            "classification": {"text": text, "label": ["a", "b"][: number % 3]},
            "tagging": {"tokens": SENTENCE + words, "labels": ROLES + ["O"] * 7},
            "srl": {"tokens": SENTENCE + words, "labels": ROLES + ["O"] * 7, "predicate": 3},
            "seq2seq": {"source": text, "target": " ".join(reversed(words))},
        }[task]


def arguments(folder, task, subcommand, model=None, data=None):
    """A configuration without what the checkpoint says (unless given), as arguments of the command line."""
    kind, kind_of_data, *_ = TASKS[task]
    settings = {
        "model": {"class_path": f"leanbert.tasks.{kind}", "init_args": model or {}},
        "data": {
            "class_path": f"leanbert.data.{kind_of_data}",
            "init_args": {"train_files": str(folder / "train.jsonl"), "cache_dir": str(folder / "cache")}
            | {"vocab_size": 300, "max_length": 32, "batch_size": 4}
            | (data or {}),
        },
        "trainer": {"accelerator": "cpu", "precision": "32-true", "default_root_dir": str(folder / "runs")}
        | {"enable_progress_bar": False},
    }
    path = folder / f"{subcommand}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return [subcommand, f"--config={path}"]


@pytest.fixture(scope="module", params=list(TASKS))
def run(request, tmp_path_factory):
    """A run of two steps, whose best checkpoint then gets weights of a size at which every input has another answer."""
    task = request.param
    folder = tmp_path_factory.mktemp(task)
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(task)))
    encoder = {"preset": "bert", "num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 48}
    _, _, model, data = TASKS[task]
    quiet_libraries()
    CLI([*arguments(folder, task, "fit", {**model, "encoder": encoder}, {"val_share": 0.2, **data}),
         "--trainer.max_steps=2"])  # fmt: skip
    version = folder / "runs" / task / "version_0"
    checkpoint = torch.load(version / "checkpoints" / "best.ckpt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for weight in checkpoint["state_dict"].values():
        weight += 0.2 * torch.randn(weight.shape, generator=generator)
    torch.save(checkpoint, version / "checkpoints" / "best.ckpt")
    return task, folder, version


def predict(folder, task, capsys, *more):
    file = folder / "asked.txt"
    file.write_text("".join(f"{line}\n" for line in ASKED[task]))
    capsys.readouterr()
    CLI([*arguments(folder, task, "predict", {k: v for k, v in TASKS[task][2].items() if k != "decoder_layers"}),
         f"--data.predict_files={file}", *more])  # fmt: skip
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def ask(model, items=None):
    method = getattr(model, METHODS[model.task])
    return method([json.loads(i) if i.startswith("{") else i for i in ASKED[model.task]] if items is None else items)


def same(ours, theirs):
    """Equal but for the last digit of a probability or score."""
    if isinstance(ours, float):
        return ours == pytest.approx(theirs, abs=3e-6)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def test_a_run_a_checkpoint_and_an_export_answer_as_predict_does(run, capsys, tmp_path):
    task, folder, version = run
    expected = predict(folder, task, capsys, "--ckpt_path=best")
    assert len({json.dumps(answer) for answer in expected}) == len(expected) >= len(ASKED[task])
    of_run = leanbert.load(version)
    of_run.export(tmp_path)
    checkpoint = version / "checkpoints" / "best.ckpt"
    renamed = shutil.copy(checkpoint, tmp_path / "renamed")
    for model in (of_run, *map(leanbert.load, (checkpoint, renamed, tmp_path))):
        assert model.task == task
        assert same(ask(model), expected)
        assert ask(model, []) == []
    assert same(predict(folder, task, capsys, f"--model.init_from={tmp_path}"), expected)


@pytest.mark.slow
def test_onnx_files_answer_as_the_model_does(run, tmp_path):
    task, folder, version = run
    CLI([*arguments(folder, task, "export"), "--ckpt_path=best", "--format=onnx", f"--output={tmp_path}"])
    model, written = leanbert.load(version), leanbert.load(tmp_path)
    assert same(ask(written), ask(model))
    assert ask(written, []) == []
    texts = ["the dog", "a much longer text about the dog and the house"]
    torch.testing.assert_close(written.encode(texts), model.encode(texts), rtol=1e-4, atol=1e-5)
    if task == "seq2seq":  # one by one, and hypotheses that change beams
        for generation in ({"beams": 1}, {"beams": 4, "no_repeat_ngram": 2}, {"beams": 3, "early": False}):
            assert same(written.translate(ASKED[task], **generation), model.translate(ASKED[task], **generation))
    with pytest.raises(UserError, match=r"^export: this model is in ONNX files already"):
        written.export(tmp_path)
    TextTokenizer.train(lambda: [" ".join(f"w{i} x{i}" for i in range(500))], vocab_size=900).save(tmp_path)
    with pytest.raises(UserError, match=r": the model knows \d+ tokens, the tokenizer has \d+\. Copy its own there$"):
        leanbert.load(tmp_path)
    with pytest.raises(UserError, match=r"^to: cuda, but a model in ONNX files is computed on the CPU"):
        written.to("cuda")
    CLI([*arguments(folder, task, "export"), "--ckpt_path=best", "--format=onnx", "--quantize=int8",
         f"--output={tmp_path / 'int8'}"])  # fmt: skip
    assert len(ask(leanbert.load(tmp_path / "int8"))) == len(ask(model))
    sizes = [sum(file.stat().st_size for file in place.glob("*.onnx")) for place in (tmp_path / "int8", tmp_path)]
    assert sizes[0] < sizes[1]


def evaluate(folder, task, capsys, subcommand, *more):
    """Return the metrics that `validate` or `test` prints."""
    capsys.readouterr()
    data = {"val_share": 0.2} if task == "mlm" else {"val_share": 0.2, "test_files": str(folder / "train.jsonl")}
    settings = {name: value for name, value in TASKS[task][2].items() if name != "decoder_layers"}
    CLI([*arguments(folder, task, subcommand, settings, data), *more])
    return json.loads(capsys.readouterr().out)


def test_folders_are_evaluated_and_answer_as_their_checkpoint_does(run, capsys, tmp_path):
    task, folder, version = run
    model, subcommand = leanbert.load(version), "validate" if task == "mlm" else "test"
    expected, answers = evaluate(folder, task, capsys, subcommand, "--ckpt_path=best"), ask(model)
    assert len(expected) > 2
    for format in ("onnx", "hf", "sparse"):
        model.export(tmp_path / format, format)
        # what the folder says counts; one of Hugging Face with a masked language model says nothing of lengths
        shorter = [] if (task, format) == ("mlm", "hf") else ["--data.max_length=20"]
        found = evaluate(folder, task, capsys, subcommand, f"--ckpt_path={tmp_path / format}", *shorter)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert same(predict(folder, task, capsys, f"--ckpt_path={tmp_path / format}"), answers)
    model.export(tmp_path / "int8", "onnx", "int8")
    losses = [
        evaluate(folder, task, capsys, "validate", f"--ckpt_path={path}", "--model.compile=true")["val/loss"]
        for path in (tmp_path / "onnx", tmp_path / "int8")
    ]
    assert 1e-6 < abs(losses[1] - losses[0]) < 0.1 * losses[0]


def test_what_a_folder_is_not_for_is_said(run, tmp_path):
    task, folder, version = run
    model, onnx, plain = leanbert.load(version), tmp_path / "onnx", tmp_path / "hf"
    model.export(onnx, "onnx")
    model.export(plain)
    (tmp_path / "empty").mkdir()

    def refused(subcommand, *more, path=onnx, kind=task):
        with pytest.raises(UserError) as caught:
            CLI([*arguments(folder, kind, subcommand), *([f"--ckpt_path={path}"] if path else []), *more])
        return str(caught.value)

    for subcommand in ("fit", "export", "compress"):
        more = [] if subcommand == "fit" else [f"--output={tmp_path / 'new'}"]
        assert refused(subcommand, *more).startswith(
            f"--ckpt_path: {onnx} holds ONNX files, which can be neither trained nor changed: only validate, test, "
            f"predict take them. Give {subcommand} the checkpoint"
        )
    assert "weights only, from which training cannot go on. Start a new run" in refused("fit", path=plain)
    assert "is a folder without a model" in refused("validate", path=tmp_path / "empty")
    assert refused("fit", f"--model.init_from={onnx}", path=None).startswith(f"{onnx}: holds ONNX files, which cannot")
    assert refused("predict", "--trainer.accelerator=gpu").startswith("trainer.accelerator: gpu, but the ONNX files of")
    assert refused("predict", "--trainer.precision=bf16-mixed").startswith("trainer.precision: bf16-mixed, but the ON")
    other = "mlm" if task != "mlm" else "tagging"
    for path in (onnx, plain):
        assert f"{path} is a model of task {task}, not {other}" in refused("validate", path=path, kind=other)
    assert not (tmp_path / "new").exists()


def test_a_sparse_folder_answers_as_the_pruned_model_does(run, tmp_path, capsys):
    task, folder, version = run
    checkpoint = torch.load(version / "checkpoints" / "best.ckpt", weights_only=True)
    for weight in checkpoint["state_dict"].values():
        if weight.dim() == 2:
            weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.8] = 0.0
    torch.save(checkpoint, tmp_path / "pruned.ckpt")
    dense, output = leanbert.load(tmp_path / "pruned.ckpt"), tmp_path / "sparse"
    CLI([*arguments(folder, task, "export"), f"--ckpt_path={tmp_path / 'pruned.ckpt'}", "--format=sparse",
         f"--output={output}"])  # fmt: skip
    size = format_size((output / "model.safetensors").stat().st_size)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"Exported     {output}: model.safetensors, {size}, float32"
    written = leanbert.load(output)
    assert (written.metadata, written.max_length) == (dense.metadata, dense.max_length)
    assert ask(written) == ask(dense)
    weights = sum(parameter.nbytes for parameter in dense.model.parameters())
    assert (output / "model.safetensors").stat().st_size < 0.5 * weights
    sparse = leanbert.load(output, weights="sparse")
    assert same(ask(sparse), ask(dense))
    assert sum(each.nbytes for each in (*sparse.model.parameters(), *sparse.model.buffers())) < 0.8 * weights
    assert same(predict(folder, task, capsys, f"--model.init_from={output}"), ask(dense))
    with pytest.raises(UserError, match=r"^export: this model was loaded with weights='sparse'"):
        sparse.export(tmp_path / "again")


def test_formats_and_weights_that_there_are_not_or_that_cannot_be(run, tmp_path):
    model = leanbert.load(run[2])
    with pytest.raises(UserError, match=r"^export: format 'torch' is unknown\. Give hf, onnx, sparse$"):
        model.export(tmp_path / "new", format="torch")
    with pytest.raises(UserError, match=r"^weights: 'csr' is unknown\. Give dense or sparse$"):
        leanbert.load(run[2], weights="csr")
    with pytest.raises(UserError, match=r"^weights: sparse, but no layer of this model has enough zeros"):
        leanbert.load(run[2], weights="sparse")
    assert not (tmp_path / "new").exists()
    others = ["model.onnx"] if run[0] == "seq2seq" else ["encoder_model.onnx", "decoder_model.onnx"]
    for format, files in (
        ("hf", ["leanbert.json", *ONNX_FILES]),
        ("sparse", ["config.json", *ONNX_FILES]),
        ("onnx", ["config.json", "leanbert.json", *others]),
    ):
        for file in files:
            folder = tmp_path / format / file
            folder.mkdir(parents=True)
            (folder / file).write_text("another model")
            with pytest.raises(UserError, match=rf"{file}: has a model of another format \({file}\)\. Choose another"):
                model.export(folder, format=format)
            assert [path.read_text() for path in folder.iterdir()] == ["another model"]
    for format in ("hf", "sparse"):  # of its own format what is there is replaced
        model.export(tmp_path / "again" / format, format=format)
        model.export(tmp_path / "again" / format, format=format)
        assert ask(leanbert.load(tmp_path / "again" / format)) == ask(model)


def test_weights_are_for_whom_the_other_files_are_for(run, tmp_path):
    mask = os.umask(0o027)
    try:
        for format in ("hf", "sparse"):
            leanbert.load(run[2]).export(tmp_path / format, format=format)
    finally:
        os.umask(mask)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.glob("*/*") if path.is_file()}
    assert len(modes) >= 8
    assert set(modes.values()) == {0o640}


def test_only_onnx_files_are_quantized(run, tmp_path):
    with pytest.raises(UserError, match=r"^export: --quantize int8 is of ONNX files\. Give --format onnx$"):
        leanbert.load(run[2]).export(tmp_path / "new", quantize="int8")
    with pytest.raises(UserError, match=r"^export: quantize 'int3' is unknown\. Give int8, int4, int8_int4, "):
        leanbert.load(run[2]).export(tmp_path / "new", "onnx", "int3")
    with pytest.raises(UserError, match=r"^export: int8_static needs data to calibrate on\. Use compress, with --"):
        leanbert.load(run[2]).export(tmp_path / "new", "onnx", "int8_static")
    rows = PackedInputs.whole_rows(torch.ones(1, 1))
    with pytest.raises(UserError, match=r"^export: seen is what int8_static is calibrated on\. Leave it out$"):
        leanbert.load(run[2]).export(tmp_path / "new", "onnx", "int8", seen=[(rows,)])
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_compress_reports_on_each_variant(run, tmp_path, capsys, monkeypatch):
    task, folder, version = run
    if task in ("classification", "srl"):
        pytest.skip("as tagging")
    _, _, model, data = TASKS[task]
    monkeypatch.setattr(variants, "default_precision", lambda device: "bf16-mixed")
    command = [*arguments(folder, task, "compress", model, {"val_share": 0.2, **data}), "--ckpt_path=best",
               f"--output={tmp_path}", "--seconds=0.1"]  # fmt: skip
    CLI([*command, '--steps=["structured_pruning=0.5", "quantize=int8"]'])
    report = json.loads((tmp_path / "report.json").read_text())
    (narrow,) = [row for row in report["variants"] if row["runtime"] == "PyTorch bfloat16"]
    rows = {row["name"]: row for row in report["variants"] if row is not narrow}
    smaller = "structured_pruning-0.5"
    assert list(rows) == ["original", "onnx", "onnxruntime-int8", smaller, f"{smaller}+int8"]
    assert report["metric"] == "val/loss"
    for name, value in rows["original"]["metrics"].items():
        assert rows["onnx"]["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    losses = [row["metrics"]["val/loss"] for row in rows.values()]
    assert [row["drop"] for row in rows.values()] == pytest.approx([loss / losses[0] - 1 for loss in losses])
    assert 1e-7 < abs(narrow["drop"]) < 0.05
    assert narrow["drop"] == pytest.approx(narrow["metrics"]["val/loss"] / losses[0] - 1)
    assert [row["huggingface"] for row in rows.values()] == ["original"] * 3 + [f"{smaller}/hf"] * 2
    small = leanbert.load(tmp_path / smaller / "hf")
    assert same(ask(small), ask(leanbert.load(tmp_path / smaller)))
    for name, row in list(rows.items())[1:]:
        assert row["size_bytes"] == sum(file.stat().st_size for file in (tmp_path / name).glob("*.onnx"))
        assert 0 < row["latency_p50"] <= row["latency_p95"]
        assert 0 < row["load_peak_bytes"] <= row["run_peak_bytes"]
    assert rows[smaller]["parameters"] < rows["onnx"]["parameters"] == rows["original"]["parameters"]
    assert rows[smaller]["flops_per_token"] < rows["onnx"]["flops_per_token"]
    assert len(ask(leanbert.load(tmp_path / f"{smaller}+int8"))) == len(ask(leanbert.load(version)))
    table, said = capsys.readouterr()
    folders = f"Hugging Face folders of models before quantization: original, {smaller}/hf"
    assert folders in said
    assert folders in (tmp_path / "report.md").read_text()
    assert table.strip() in (tmp_path / "report.md").read_text()
    assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match=r"^checkpoint\.monitor: no val/nothing is logged"):
        CLI([*command, "--checkpoint.monitor=val/nothing"])


def test_compress_needs_a_model(run, tmp_path):
    with pytest.raises(UserError, match=r"^compress: no model is named\. Give --ckpt_path"):
        CLI([*arguments(run[1], run[0], "compress"), f"--output={tmp_path / 'new'}"])
    assert not (tmp_path / "new").exists()


def test_vectors_come_from_any_task(run):
    model = leanbert.load(run[2])
    together = model.encode(["the dog", "a much longer text about the dog and the house"])
    assert together.shape == (2, 32)
    torch.testing.assert_close(together[:1], model.encode(["the dog"]), rtol=1e-4, atol=1e-5)


def test_methods_of_other_tasks_name_the_right_one(run):
    model = leanbert.load(run[2])
    for task, method in [*METHODS.items(), ("seq2seq", "summarize")]:
        if task != run[0]:
            right = METHODS[run[0]]
            with pytest.raises(UserError, match=rf"^{method}: this is a model of task {run[0]}\. Call {right}"):
                getattr(model, method)(["the dog"])
    with pytest.raises(UserError, match=r"^'the dog' is one text\. Give a list of texts$"):
        ask(model, "the dog")


def test_items_and_numbers_that_cannot_be_are_named(run):
    model, item = leanbert.load(run[2]), "sentence" if run[0] in ("tagging", "srl") else "text"
    for wrong in (None, 3, ["the", 3]):
        with pytest.raises(UserError, match=rf"^{item} 1: {re.escape(repr(wrong))} is n[^\n]*\. Give [^\n]*$"):
            ask(model, ["the dog", wrong])
    for method in (model.encode, getattr(model, METHODS[run[0]])):
        for size in (0, -1, 1.5):
            with pytest.raises(UserError, match=rf"^batch_size: {size} is out of range\. Give a whole number, 1"):
                method(["the dog"], batch_size=size)
    with pytest.raises(UserError, match=r"^text 0: \['a', 'b'\] is no text\. Give a str$"):
        model.encode([["a", "b"]])
    if run[0] == "mlm":
        with pytest.raises(UserError, match=r"^top_k: -1 is out of range\. Give a whole number, 1 or more"):
            model.fill_mask(["a [MASK]"], top_k=-1)
    if run[0] == "classification":
        for group in ((), ("a", "b", "c")):
            with pytest.raises(UserError, match=r"^text 0: \([^\n]* is neither a text nor a pair of texts\. Give one"):
                model.classify([group])


def test_transformers_cuts_where_our_answers_are_cut(run, tmp_path):
    model = leanbert.load(run[2])
    model.export(tmp_path)
    cut = 48 if run[0] == "mlm" else 32
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == cut
    assert len(theirs("dog " * 100, truncation=True)["input_ids"]) == cut
    if run[0] not in ("tagging", "srl"):  # which answer for what is cut, too
        whole = ("[MASK]" if run[0] == "mlm" else "cat") + " dog" * (cut - 3)  # with [CLS] and [SEP]
        texts = [whole, f"{whole} cat cat"]
        answers = ask(model, texts)
        assert [answer.pop("text" if "text" in answer else "source") for answer in answers] == texts
        assert same(*answers)


def test_export_by_the_command_line_loads_in_transformers(run, tmp_path):
    task, folder, _ = run
    CLI([*arguments(folder, task, "export"), "--ckpt_path=best", f"--output={tmp_path}"])
    name = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    _, report = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())


def test_training_goes_on_from_an_export(run, tmp_path):
    task, folder, version = run
    leanbert.load(version / "checkpoints" / "step-00000002.ckpt").export(tmp_path / "start")
    _, _, model, data = TASKS[task]
    CLI([*arguments(folder, task, "fit", model, {"val_share": 0.2, **data}), "--trainer.max_steps=1",
         f"--model.init_from={tmp_path / 'start'}", f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
    first = scalars(tmp_path / task / "version_0")["val/loss"][0]
    assert first == pytest.approx(scalars(version)["val/loss"][2], abs=1e-5)


# ---- each task


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(lambda: [" ".join(WORDS)] * 3, vocab_size=300)


def classifier(folder, tokenizer, labels, task, metadata=None, **settings):
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 48, "preset": "bert"}
    of = "text" if task == "classification" else "word"
    model = build_model(
        EncoderConfig(**sizes | settings), tokenizer.vocab_size, lambda config: Classifier(config, labels, of, task)
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(weight)))
    Pretrained(model, tokenizer, ModelMetadata(task, **(metadata or {}))).export(folder)
    return leanbert.load(folder)


def test_pairs_are_classified_as_transformers_does(tmp_path, tokenizer):
    model = classifier(tmp_path, tokenizer, ["yes", "no"], "classification")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    pairs = [("the cook", "a cake"), ("the old dog sees", "the cat"), ("a\tguest", "in the house")]
    encoded = their_tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        best = theirs(**encoded).logits.softmax(-1).max(-1)
    answers = model.classify(pairs)
    assert encoded["token_type_ids"].max() == 1
    assert [answer["label"] for answer in answers] == [["yes", "no"][place] for place in best.indices]
    assert [answer["probability"] for answer in answers] == pytest.approx(best.values.tolist(), abs=2e-6)
    assert answers[0]["text"] == "the cook\ta cake"
    assert model.classify(["the cook"])[0]["probability"] != answers[0]["probability"]


def test_texts_are_as_many_as_in_training(tmp_path, tokenizer):
    pair, single = ("the cook", "a cake"), "the cook"
    for texts, right, wrong, words in (
        (1, single, pair, r"a pair, but the model was trained on single texts"),
        (2, pair, single, r"one text, but the model was trained on pairs of texts"),
    ):
        model = classifier(tmp_path / str(texts), tokenizer, ["x", "y"], "classification", {"texts": texts})
        assert len(model.classify([right])) == 1
        with pytest.raises(UserError, match=rf"^text 1: is {words}\. Give such$"):
            model.classify([right, wrong])


def test_numbers_and_thresholds(tmp_path, tokenizer):
    metadata = {"problem": "regression"}
    values = classifier(tmp_path / "r", tokenizer, ["x", "y"], "classification", metadata).classify(["the cook"])[0]
    assert len(values["values"]) == 2
    answers = {}
    for threshold in (0.000001, 0.999999):
        metadata = {"problem": "multi", "threshold": threshold}
        model = classifier(tmp_path / str(threshold), tokenizer, ["x", "y"], "classification", metadata)
        answers[threshold] = [each["label"] for each in model.classify(["the cook"])[0]["labels"]]
    assert (sorted(answers[0.000001]), answers[0.999999]) == (["x", "y"], [])


def test_sentences_may_be_lists_of_words(tmp_path, tokenizer):
    model = classifier(tmp_path, tokenizer, ["O", "B-X", "I-X"], "tagging")
    assert model.tag([SENTENCE]) == model.tag([" ".join(SENTENCE)])
    assert model.tag([["dog"], []])[1] == {"tokens": [], "labels": [], "text": ""}
    long = ["dog"] * 100
    assert model.tag([long])[0]["labels"][46:] == ["O"] * 54


def test_predicates_are_given_or_found(tmp_path, tokenizer):
    model = classifier(tmp_path, tokenizer, ["O", "B-PRED", "B-V", "B-ARG0"], "srl", {"mark": "tokens"})
    given = {"tokens": SENTENCE, "predicate": 3}
    answers = model.label_roles([given, SENTENCE])
    assert answers[0]["predicate"] == 3
    assert {answer["predicate"] for answer in answers[1:]} != {None}
    assert model.label_roles([given]) == answers[:1]
    for wrong, message in (
        ({"tokens": SENTENCE, "predicate": 9}, r"^sentence 1: predicate 9 is not the place of one of 9 words, 0 to 8$"),
        ({"predicate": 3}, r'^sentence 1: no "tokens" in it'),
        ({"tokens": "the dog"}, r"^sentence 1: 'the dog' is no list of words\. Give one, or a text with spaces"),
    ):
        with pytest.raises(UserError, match=message):
            model.label_roles([SENTENCE, wrong])


def test_labels_that_are_no_bio_tags_are_refused(tmp_path, tokenizer):
    model = classifier(tmp_path, tokenizer, ["NOUN", "VERB"], "tagging")
    with pytest.raises(UserError, match=r"^tag: labels must be different BIO tags, O, B-x or I-x: NOUN, VERB"):
        model.tag(["the dog"])


@pytest.mark.parametrize("run", ["seq2seq"], indirect=True)
class TestSequenceToSequence:
    def test_settings_of_generation_are_those_of_the_run_unless_given(self, run):
        model, asked = leanbert.load(run[2]), ASKED["seq2seq"]
        assert model.translate(asked) == model.summarize(asked, beams=2)
        assert same(model.translate(asked, batch_size=1), model.translate(asked))
        found = {beams: model.translate(asked, beams=beams, no_repeat_ngram=1) for beams in (1, 2)}
        assert found[1] != found[2] == model.translate(asked, no_repeat_ngram=1) != model.translate(asked)
        assert [answer["source"] for answer in found[1]] == asked
        with pytest.raises(UserError, match=r"^beam: no setting of generation\. There are beams, "):
            model.translate(asked, beam=2)

    def test_transformers_generates_the_same_outputs(self, run, tmp_path):
        model = leanbert.load(run[2])
        model.export(tmp_path)
        theirs = transformers.EncoderDecoderModel.from_pretrained(tmp_path).eval()
        config = theirs.generation_config
        assert (config.num_beams, config.suppress_tokens, config.max_length) == (2, [0, 1, 2, 4], 32)  # all but [SEP]
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in ASKED["seq2seq"]:
            encoded = tokenizer(text, return_tensors="pt")
            more = 2 * encoded["input_ids"].shape[1] + 3
            found = theirs.generate(
                input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], num_beams=1,
                max_new_tokens=more,
            )  # fmt: skip
            expected = model.translate([text], beams=1)[0]["output"]
            assert tokenizer.decode(found[0], skip_special_tokens=True) == expected != ""

    def test_another_decoder_does_not_go_on(self, run):
        task, folder, _ = run
        encoder = {"preset": "bert", "num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 48}
        for changes, message in (
            ({}, r"^model\.decoder_layers: is 2, but the checkpoint has 1\."),
            ({"decoder_layers": 1, "decoder_start": "shared"}, r"^model\.decoder_start: is shared, but the checkpoint"),
        ):
            with pytest.raises(UserError, match=message):
                CLI([*arguments(folder, task, "fit", {**changes, "encoder": encoder}, {"val_share": 0.2}),
                     "--ckpt_path=last", "--trainer.max_steps=3"])  # fmt: skip
