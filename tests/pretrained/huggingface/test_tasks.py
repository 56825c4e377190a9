"""Models of the tasks to Hugging Face folders and back: classifiers, and encoder with decoder."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from leanbert.errors import UserError
from leanbert.models.classifier import Classifier
from leanbert.models.config import EncoderConfig
from leanbert.models.seq2seq import Seq2SeqModel
from leanbert.models.stored import ModelMetadata
from leanbert.pretrained.build import build_model, rebuild
from leanbert.pretrained.huggingface.convert import read_huggingface, write_huggingface
from tests.pretrained.huggingface.test_convert import OURS, bert, inputs, modernbert, randomise
from tests.pretrained.pairs import tiny_seq2seq
from tests.tiny import whole_rows

LABELS = ["O", "B-X", "I-X"]
IDS = {"pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2}
FIRST = torch.zeros(3, 1, dtype=torch.int64)


def classifier(task, labels=LABELS, **settings):
    of = "text" if task == "classification" else "word"
    config = EncoderConfig(**OURS | settings)
    return randomise(build_model(config, 99, lambda full: Classifier(full, labels, of, task)))


def seq2seq(start="encoder", layers=2, targets=None, **settings):
    config = EncoderConfig(**OURS | {"preset": "bert"} | settings)
    return randomise(build_model(config, 99, lambda full: Seq2SeqModel(full, layers, start, target_vocab_size=targets)))


def loaded(kind, folder):
    found, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return found.eval()


def scores(model, segments=True):
    """Scores of texts at their first token [B, L], or of all tokens [B, S, L], in rows with padding."""
    ids, real, kinds = inputs()
    with torch.no_grad():
        found = model(whole_rows(ids, real, kinds if segments else None))
    return found[:, 0] if model.of == "text" else found * real[:, :, None]


def their_scores(model, segments=True):
    ids, real, kinds = inputs()
    extra = {"token_type_ids": kinds} if segments else {}
    with torch.no_grad():
        found = model(ids, attention_mask=real, **extra).logits
    assert found.std() > 0.02
    return found if found.dim() == 2 else found * real[:, :, None]


@pytest.mark.parametrize("preset", ["bert", "modern"])
@pytest.mark.parametrize(
    ("task", "kind", "auto"),
    [
        ("classification", "ForSequenceClassification", transformers.AutoModelForSequenceClassification),
        ("tagging", "ForTokenClassification", transformers.AutoModelForTokenClassification),
        ("srl", "ForTokenClassification", transformers.AutoModelForTokenClassification),
    ],
)
def test_classifiers_leave_and_come_back_with_equal_logits(tmp_path, preset, task, kind, auto):
    ours = classifier(task, preset=preset, dropout=0.2)
    problem = "single" if task == "classification" else None
    metadata = ModelMetadata(task, labels=LABELS, max_length=24, problem=problem)
    write_huggingface(ours, tmp_path, {"pad_token_id": 0}, metadata)
    theirs = loaded(auto, tmp_path)
    assert type(theirs).__name__ == {"bert": "Bert", "modern": "ModernBert"}[preset] + kind
    segments = preset == "bert"
    assert (scores(ours, segments) - their_scores(theirs, segments)).abs().max() <= 1e-5
    assert theirs.num_parameters() == ours.num_parameters
    config = theirs.config
    assert (config.id2label, config.label2id["I-X"]) == ({0: "O", 1: "B-X", 2: "I-X"}, 2)
    assert (config.classifier_dropout, config.pad_token_id) == (0.2, 0)
    assert config.problem_type == ("single_label_classification" if task == "classification" else None)
    stored = read_huggingface(tmp_path)
    assert stored.metadata == metadata
    assert torch.equal(scores(rebuild(stored, 99).eval()), scores(ours))


@pytest.mark.parametrize(
    ("problem", "labels", "theirs"),
    [
        ("multi", ["a", "b"], "multi_label_classification"),
        ("regression", ["score"], "regression"),
        ("regression", ["score", "score"], "regression"),
    ],
)
def test_the_kind_of_labels_is_kept(tmp_path, problem, labels, theirs):
    ours = classifier("classification", labels, preset="bert")
    metadata = ModelMetadata("classification", labels=labels, problem=problem, threshold=0.3)
    write_huggingface(ours, tmp_path, metadata=metadata)
    found = loaded(transformers.BertForSequenceClassification, tmp_path)
    assert (found.config.problem_type, found.config.num_labels) == (theirs, len(labels))
    assert (scores(ours) - their_scores(found)).abs().max() <= 1e-5
    assert read_huggingface(tmp_path).metadata == metadata


@pytest.mark.parametrize(
    ("make", "kind", "settings", "task", "problem"),
    [
        (bert, "BertForSequenceClassification", {"num_labels": 3}, "classification", "single"),
        (bert, "BertForSequenceClassification", {}, "classification", "single"),
        (bert, "BertForSequenceClassification", {"num_labels": 1}, "classification", "regression"),
        (bert, "BertForTokenClassification", {"num_labels": 3}, "tagging", None),
        (modernbert, "ModernBertForSequenceClassification", {"num_labels": 3}, "classification", "single"),
        (modernbert, "ModernBertForTokenClassification", {"num_labels": 3}, "tagging", None),
    ],
)
def test_foreign_classifiers_are_read(tmp_path, make, kind, settings, task, problem):
    theirs = make(getattr(transformers, kind), **settings)
    theirs.save_pretrained(tmp_path)
    stored = read_huggingface(tmp_path)
    labels = [f"LABEL_{number}" for number in range(settings.get("num_labels", 2))]
    assert stored.metadata == ModelMetadata(task, labels=labels, problem=problem)
    ours = rebuild(stored, 99).eval()
    assert (scores(ours, make is bert) - their_scores(theirs, make is bert)).abs().max() <= 1e-4


def test_pooling_that_we_do_not_have_is_refused(tmp_path):
    modernbert(transformers.ModernBertForSequenceClassification, classifier_pooling="mean").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: classifier_pooling 'mean' is not supported"):
        read_huggingface(tmp_path).read_weights()


@pytest.mark.parametrize("start", ["encoder", "shared", "random"])
@pytest.mark.parametrize("settings", [{}, {"position": "sinusoidal"}, {"num_heads": 3, "head_size": 8}])
def test_encoder_decoder_leaves_and_comes_back_with_equal_logits(tmp_path, start, settings):
    ours = seq2seq(start, **settings)
    metadata = ModelMetadata("seq2seq", max_length=24, decoder_layers=2, decoder_start=start)
    write_huggingface(ours, tmp_path, IDS, metadata)
    theirs = loaded(transformers.EncoderDecoderModel, tmp_path)
    assert theirs.decoder.cls.predictions.decoder.weight is theirs.decoder.bert.embeddings.word_embeddings.weight
    config = theirs.config
    assert [getattr(config, name) for name in IDS] == [0, 1, 2]
    assert (config.vocab_size, config.encoder.vocab_size, config.decoder.vocab_size) == (99, 99, 99)
    assert (config.encoder.num_hidden_layers, config.decoder.num_hidden_layers) == (3, 2)
    assert target_scores_differ(ours, theirs) <= 1e-5
    stored = read_huggingface(tmp_path)
    assert stored.metadata == replace(metadata, decoder_start=None)
    assert target_scores_differ(rebuild(stored, 99).eval(), theirs) <= 1e-5


@pytest.mark.parametrize("targets", [70, 99, 130])
def test_a_vocabulary_of_targets_leaves_and_comes_back(tmp_path, targets):
    """99: as many tokens as sources have, but other ones."""
    ours = seq2seq(targets=targets)
    metadata = ModelMetadata("seq2seq", max_length=24)
    write_huggingface(ours, tmp_path, IDS, metadata, {"pad_token_id": 5})
    theirs = loaded(transformers.EncoderDecoderModel, tmp_path)
    config = theirs.config
    assert (config.vocab_size, config.encoder.vocab_size, config.decoder.vocab_size) == (targets, 99, targets)
    assert [getattr(config, name) for name in IDS] == [0, 1, 2]
    assert (config.encoder.pad_token_id, config.decoder.pad_token_id) == (5, 0)
    assert theirs.decoder.cls.predictions.decoder.weight is theirs.decoder.bert.embeddings.word_embeddings.weight
    assert target_scores_differ(ours, theirs, targets) <= 1e-5
    stored = read_huggingface(tmp_path)
    assert stored.metadata == replace(metadata, decoder_layers=2, target_vocab_size=targets)
    assert target_scores_differ(rebuild(stored, 99, targets).eval(), theirs, targets) <= 1e-5
    with pytest.raises(UserError, match=rf"the decoder knows {targets} tokens, the tokenizer of targets has 131\. Use"):
        rebuild(stored, 99, 131)


def test_a_foreign_vocabulary_of_targets_is_read(tmp_path):
    theirs = encoder_decoder(vocab_size=70)
    theirs.save_pretrained(tmp_path)
    stored = read_huggingface(tmp_path)
    assert stored.metadata == ModelMetadata("seq2seq", decoder_layers=2, target_vocab_size=70)
    assert target_scores_differ(rebuild(stored, 99, 70).eval(), theirs.eval(), 70) <= 1e-5


def target_scores_differ(ours, theirs, tokens=99):
    """Largest difference of logits at target tokens, with padding in sources and in targets."""
    ids, real, _ = inputs()
    target, length = ids.flip(1)[:, :13] % tokens, torch.tensor([[13], [5], [9]])
    there = (torch.arange(13) < length).long()
    with torch.no_grad():
        mine = ours(whole_rows(ids, real), whole_rows(target, there))
        other = theirs(
            input_ids=ids, attention_mask=real, decoder_input_ids=target, decoder_attention_mask=there
        ).logits
    assert mine.shape == other.shape == (3, 13, tokens)
    assert other.std() > 0.1
    return ((mine - other).abs() * there[:, :, None]).max().item()


def test_foreign_encoder_decoders_are_read_where_their_embeddings_are_one(tmp_path):
    theirs = encoder_decoder()
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path}: encoder and decoder have different token embeddings"):
        read_huggingface(tmp_path).read_weights()
    state = load_file(tmp_path / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    state[f"decoder.bert.{name}"] = state[f"encoder.{name}"].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored = read_huggingface(tmp_path)
    assert stored.metadata == ModelMetadata("seq2seq", decoder_layers=2)
    theirs = loaded(transformers.EncoderDecoderModel, tmp_path)
    assert target_scores_differ(rebuild(stored, 99).eval(), theirs) <= 1e-5


def encoder_decoder(**changes):
    encoder = bert().config.to_dict()
    decoder = encoder | {"num_hidden_layers": 2, "is_decoder": True, "add_cross_attention": True} | changes
    return randomise(
        transformers.EncoderDecoderModel(transformers.EncoderDecoderConfig(encoder=encoder, decoder=decoder))
    )


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("decoder", {"model_type": "gpt2"}, "decoder is no BERT"),
        ("decoder", {"add_cross_attention": False}, "the decoder has no cross-attention"),
        ("decoder", {"intermediate_size": 40}, "intermediate_size is 48 in the encoder and 40 in the decoder"),
    ],
)
def test_foreign_encoder_decoders_that_we_do_not_have_are_refused(tmp_path, part, changes, message):
    write_huggingface(seq2seq(intermediate_size=48), tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings[part] |= changes
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"config\.json: [^\n]*{message}"):
        read_huggingface(tmp_path).read_weights()


def test_a_modern_decoder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^model\.encoder\.preset: [^\n]* Export with onnx, or train with pre"):
        write_huggingface(seq2seq(preset="modern"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_pointer_has_no_class_there(tmp_path):
    model = tiny_seq2seq(preset="bert", copy=True)
    with pytest.raises(UserError, match=r"^model\.copy: [^\n]* cannot copy\. Export with onnx, or train without it$"):
        write_huggingface(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 3}, r"model\.decoder_layers: 3, but \S+ has 2\. Set it to 2"),
        ({"start": "shared"}, r"model\.decoder_start: shared, but the decoder of \S+ has weights of its own"),
    ],
)
def test_a_decoder_that_is_made_otherwise_is_no_start(tmp_path, settings, message):
    write_huggingface(seq2seq(), tmp_path)
    layers, start = settings.get("layers", 2), settings.get("start", "encoder")
    with pytest.raises(UserError, match=message):
        build_model(EncoderConfig(), 99, lambda full: Seq2SeqModel(full, layers, start), init_from=tmp_path)


@pytest.mark.parametrize(
    ("stored", "own", "message"),
    [
        (None, 70, r"the model at \S+ has one tokenizer for sources and targets\. Leave it out"),
        (70, None, r"the model at \S+ has one of its own for targets\. Set it to \S+"),
        (70, 71, r"has 71 tokens, the decoder of \S+ knows 70\. Set it to \S+"),
    ],
)
def test_a_decoder_of_other_tokens_is_no_start(tmp_path, stored, own, message):
    write_huggingface(seq2seq(targets=stored), tmp_path)
    with pytest.raises(UserError, match=rf"^data\.target_tokenizer: {message}$"):
        build_model(
            EncoderConfig(), 99, lambda full: Seq2SeqModel(full, 2, "encoder", target_vocab_size=own),
            init_from=tmp_path,
        )  # fmt: skip


def test_a_shared_decoder_goes_on_from_its_export(tmp_path):
    ours = seq2seq("shared")
    write_huggingface(ours, tmp_path)
    again = build_model(EncoderConfig(), 99, lambda full: Seq2SeqModel(full, 2, "shared"), init_from=tmp_path)
    assert again.num_parameters == ours.num_parameters
    assert same_weights(again, ours) == set(ours.state_dict())


def same_weights(one, other):
    """Names of equal weights, whatever is in the padding rows of the vocabulary."""
    theirs = other.state_dict()
    rows = dict.fromkeys(("encoder.embeddings.token.weight", "head.bias"), 99)
    return {n for n, w in one.state_dict().items() if torch.equal(w[: rows.get(n)], theirs[n][: rows.get(n)])}


@pytest.mark.parametrize("preset", ["bert", "modern"])
def test_scores_of_other_labels_are_not_taken_over(tmp_path, preset):
    ours = classifier("classification", preset=preset)
    write_huggingface(ours, tmp_path)

    def start(labels, task="classification", of="text"):
        made = build_model(EncoderConfig(), 99, lambda full: Classifier(full, labels, of, task), init_from=tmp_path)
        return same_weights(made, ours)

    everything = set(ours.state_dict())
    assert start(LABELS) == everything
    assert start(LABELS[::-1]) == everything - {"head.scores.weight", "head.scores.bias"}
    assert all(name.startswith(("encoder.", "head.norm.")) for name in start(LABELS, "tagging", "word"))


@pytest.mark.parametrize("preset", ["bert", "modern"])
@pytest.mark.parametrize(("of", "task"), [("text", "classification"), ("word", "tagging"), ("word", "srl")])
def test_labels_start_from_a_masked_language_model(tmp_path, preset, of, task):
    ours = randomise(build_model(EncoderConfig(**OURS | {"preset": preset}), 99))
    write_huggingface(ours, tmp_path)
    made = build_model(EncoderConfig(), 99, lambda full: Classifier(full, LABELS, of, task), init_from=tmp_path)
    shared = set(ours.state_dict()) & set(made.state_dict())
    assert any(name.startswith("head.") for name in shared) == (preset == "modern")
    assert same_weights_of(shared, made, ours)


def same_weights_of(names, one, other):
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(*(state[name][:99] for state in states)) for name in names)
