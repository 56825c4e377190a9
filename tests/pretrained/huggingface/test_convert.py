import json
import logging
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from leanbert.errors import UserError
from leanbert.models.config import EncoderConfig
from leanbert.pretrained.build import build_model
from leanbert.pretrained.huggingface.convert import read_huggingface, write_huggingface
from tests.tiny import whole_rows

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
OURS = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "max_positions": 64}


def randomise(model):
    """Weights of a size at which every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def bert(kind=transformers.BertForMaskedLM, **changes):
    torch.manual_seed(0)
    return randomise(kind(transformers.BertConfig(**SIZES | changes)))


def modernbert(kind=transformers.ModernBertForMaskedLM, **changes):
    torch.manual_seed(0)
    settings = SIZES | IDS | {"local_attention": 8} | changes
    return randomise(kind(transformers.ModernBertConfig(**settings)))


def inputs():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 99, (3, 40), generator=generator)
    real = (torch.arange(40) < torch.tensor([[40], [31], [7]])).long()
    return ids, real, torch.randint(0, 2, (3, 40), generator=generator)


def difference(ours, theirs, segments):
    """Largest difference of logits at real tokens, in rows with padding."""
    ids, real, kinds = inputs()
    extra = {"token_type_ids": kinds} if segments else {}
    with torch.no_grad():
        mine = ours(whole_rows(ids, real, kinds if segments else None))
        other = theirs(ids, attention_mask=real, **extra).logits
    assert other.std() > 0.1
    return ((mine - other).abs() * real[:, :, None]).max().item()


def imported(model, folder, **save):
    model.save_pretrained(folder, **save)
    return build_model(EncoderConfig(), 99, init_from=folder).eval()


def exported(model, folder):
    write_huggingface(model, folder, {"pad_token_id": 0})
    found, report = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return found.eval()


def test_bert_both_ways(tmp_path):
    theirs = bert()
    ours = imported(theirs, tmp_path / "in")
    assert difference(ours, theirs, segments=True) <= 1e-5
    back = exported(ours, tmp_path / "out")
    assert type(back) is transformers.BertForMaskedLM
    assert difference(ours, back, segments=True) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"global_attn_every_n_layers": 2, "hidden_activation": "silu"},
        {"layer_types": ["full_attention"] * 5},
        dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True),
    ],
)
def test_modernbert_both_ways(tmp_path, changes):
    theirs = modernbert(**changes)
    ours = imported(theirs, tmp_path / "in")
    assert difference(ours, theirs, segments=False) <= 1e-4
    back = exported(ours, tmp_path / "out")
    assert type(back) is transformers.ModernBertForMaskedLM
    assert back.config.layer_types == theirs.config.layer_types
    assert difference(ours, back, segments=False) <= 1e-4


@pytest.mark.parametrize(
    "settings", [{"preset": "bert"}, {"preset": "modern"}, {"preset": "bert", "position": "sinusoidal"}]
)
def test_our_own_models_leave_with_equal_logits(tmp_path, settings):
    ours = randomise(build_model(EncoderConfig(**OURS, **settings), 99))
    theirs = exported(ours, tmp_path)
    assert difference(ours, theirs, segments=settings["preset"] == "bert") <= 1e-5
    assert theirs.num_parameters() == ours.num_parameters + (64 * 32 if "position" in settings else 0)
    assert theirs.config.pad_token_id == 0


@pytest.mark.parametrize(("preset", "bias"), [("bert", True), ("modern", True), ("modern", False)])
def test_missing_heads_leave_as_zeros_with_equal_logits(tmp_path, preset, bias):
    config = EncoderConfig(**OURS | {"num_heads": 3}, preset=preset, head_size=8, bias=bias)
    ours = randomise(build_model(config, 99))
    theirs = exported(ours, tmp_path)
    assert theirs.config.num_attention_heads == 4
    assert difference(ours, theirs, segments=preset == "bert") <= 1e-5
    back = build_model(EncoderConfig(), 99, init_from=tmp_path).eval()
    assert (back.config.num_heads, back.config.head_size) == (4, 8)
    assert difference(back, theirs, segments=preset == "bert") <= 1e-5


def test_bfloat16_weights_stay_bfloat16(tmp_path):
    theirs = exported(randomise(build_model(EncoderConfig(**OURS), 99)).bfloat16(), tmp_path)
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}


def test_shards_and_pickles_hold_the_same_model(tmp_path):
    theirs = bert()
    ours = imported(theirs, tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert difference(ours, theirs, segments=True) <= 1e-5
    theirs.config.save_pretrained(tmp_path / "pickle")
    torch.save(theirs.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    ours = build_model(EncoderConfig(), 99, init_from=tmp_path / "pickle").eval()
    assert difference(ours, theirs, segments=True) <= 1e-5


def test_names_of_old_files_are_understood(tmp_path):
    theirs = bert(transformers.BertForPreTraining)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    old = {key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): state[key] for key in state}
    save_file(old, tmp_path / "model.safetensors")
    ours = build_model(EncoderConfig(), 99, init_from=tmp_path).eval()
    alone = transformers.BertForMaskedLM(theirs.config).eval()
    alone.load_state_dict(theirs.state_dict(), strict=False)
    assert difference(ours, alone, segments=True) <= 1e-5


@pytest.mark.parametrize(("make", "kind"), [(bert, "BertModel"), (modernbert, "ModernBertModel")])
def test_encoder_without_head_gets_a_fresh_one_and_says_so(tmp_path, caplog, make, kind):
    theirs = make(getattr(transformers, kind))
    with caplog.at_level(logging.WARNING):
        ours = imported(theirs, tmp_path)
    assert "starts from fresh weights" in caplog.text
    ids, real, _ = inputs()
    with torch.no_grad():
        hidden = ours.encode(whole_rows(ids, real)) - theirs(ids, attention_mask=real).last_hidden_state
    assert (hidden.abs() * real[:, :, None]).max() <= 1e-4
    assert ours.head.bias.abs().max() == 0
    assert ours.head.dense.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_settings_come_back_from_an_export(tmp_path):
    config = EncoderConfig(**OURS, activation="swiglu", local_window=6, global_every=2, rotary_theta=500.0)
    model = build_model(config, 99)
    write_huggingface(model, tmp_path)
    stored = read_huggingface(tmp_path)
    found, state = stored.config, stored.read_weights()
    assert found == model.config
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("activation", {"preset": "modern", "activation": "gelu"}),
        ("norm_position", {"preset": "modern", "norm_position": "post"}),
        ("type_vocab_size", {"preset": "modern", "type_vocab_size": 2}),
        ("norm_position", {"preset": "bert", "norm_position": "pre"}),
        ("bias", {"preset": "bert", "bias": False}),
        ("local_window", {"preset": "bert", "local_window": 8}),
        ("type_vocab_size", {"preset": "bert", "type_vocab_size": 0}),
        ("num_heads", {"num_heads": 5, "head_size": 8}),
        ("head_size", {"num_heads": 2, "head_size": 12}),
    ],
)
def test_what_no_class_expresses_is_refused(tmp_path, setting, values):
    model = build_model(EncoderConfig(**OURS | values), 99)
    with pytest.raises(UserError, match=rf"^model\.encoder\.{setting}: [^\n]* to export$"):
        write_huggingface(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (bert, {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        (bert, {"model_type": "roberta"}, "model_type 'roberta' is not supported"),
        (bert, {"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering is not supported"),
        (bert, {"tie_word_embeddings": "no"}, "tie_word_embeddings 'no' is neither true nor false"),
        (bert, {"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        (bert, {"num_attention_heads": 5}, r"hidden_size: 32 is not divisible by num_heads 5"),
        (bert, {"hidden_size": "wide"}, "hidden_size 'wide' is out of range"),
        (modernbert, {"hidden_activation": "relu"}, "hidden_activation 'relu' is not supported"),
        (modernbert, {"mlp_bias": True}, "mlp_bias True is not supported"),
        (modernbert, {"decoder_bias": False}, "decoder_bias False is not supported"),
        (modernbert, {"layer_types": ["sliding_attention"] * 5}, "layer_types have no regular pattern"),
        (modernbert, {"rope_scaling": {"factor": 2.0}}, "scaled rotary positions are not supported"),
    ],
)
def test_foreign_settings_are_refused(tmp_path, make, changes, message):
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=rf"config\.json: [^\n]*{message}"):
        read_huggingface(tmp_path).read_weights()


def test_weights_that_do_not_fit_are_named(tmp_path):
    bert().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    norm = "bert.encoder.layer.4.output.LayerNorm.weight"
    for broken, message in (
        ({key: state[key] for key in state if key != norm}, rf"lack {norm} \(1 in all\)"),
        (state | {"bert.extra": torch.ones(1)}, r"have unexpected bert\.extra \(1 in all\)"),
        (state | {norm: torch.ones(31)}, rf"{norm} has shape \[31\], config\.json asks for \[32\]"),
    ):
        save_file(broken, path)
        with pytest.raises(UserError, match=rf"^{tmp_path}: [^\n]*{message}"):
            read_huggingface(tmp_path).read_weights()


# ---- folders of other tools


def folder_of(tmp_path, theirs, rename=lambda name: name, add=None, drop=(), config=None):
    """Save a model with other names of weights, and with or without some settings."""
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {rename(name): tensor for name, tensor in load_file(path).items() if name not in drop}
    save_file({**state, **(add or {})}, path, metadata={"format": "pt"})
    if config is not None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config(json.loads(path.read_text()))))
    return tmp_path


def agrees(folder, make=transformers.BertForMaskedLM, segments=True):
    """Whether our logits are those of transformers, which finds every weight."""
    theirs, report = make.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    ours = build_model(EncoderConfig(), 99, init_from=folder).eval()
    return difference(ours, theirs.eval(), segments) <= 1e-5


def without(*names):
    return lambda settings: {name: value for name, value in settings.items() if name not in names}


def test_the_output_bias_is_read_by_either_name(tmp_path):
    theirs = bert()
    bias = theirs.cls.predictions.bias.detach().clone()
    name, other = "cls.predictions.bias", "cls.predictions.decoder.bias"
    assert agrees(folder_of(tmp_path / "alone", theirs, add={other: bias}, drop=[name]))
    assert agrees(folder_of(tmp_path / "both", theirs, add={other: bias + 1}))  # transformers takes this one


@pytest.mark.parametrize("kept", ["architectures", None])
def test_a_config_without_model_type_is_known_by_its_settings(tmp_path, kept):
    dropped = {"model_type", "architectures", "transformers_version"} - {kept}
    assert agrees(folder_of(tmp_path / "bert", bert(), config=without(*dropped)))
    modern = folder_of(tmp_path / "modern", modernbert(), config=without(*dropped))
    assert agrees(modern, transformers.ModernBertForMaskedLM, segments=False)


def test_what_nothing_tells_is_refused_with_the_line_to_add(tmp_path):
    tell = r'If it is a BERT, add "model_type": "bert"$'
    for number, settings in enumerate(({}, {"hidden_size": 32}, {"dim": 32, "n_layers": 5})):
        folder = folder_of(tmp_path / str(number), bert(), config=lambda _, settings=settings: settings)
        with pytest.raises(UserError, match=tell):
            read_huggingface(folder).read_weights()
    roberta = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES))  # has the same settings
    for name, model in (("with", roberta), ("without", roberta.roberta)):
        with pytest.raises(UserError, match=tell):
            read_huggingface(
                folder_of(tmp_path / name, model, config=without("model_type", "architectures"))
            ).read_weights()
    with pytest.raises(UserError, match=tell):
        read_huggingface(folder_of(tmp_path / "named", roberta, config=without("model_type"))).read_weights()


@pytest.mark.parametrize("wrapped", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("make", [bert, modernbert])
def test_wrappers_of_modules_leave_the_names_of_weights(tmp_path, make, wrapped):
    theirs = make()
    folder_of(tmp_path, theirs, rename=lambda name: wrapped + name)
    ours = build_model(EncoderConfig(), 99, init_from=tmp_path).eval()
    assert difference(ours, theirs, segments=make is bert) <= 1e-4
    folder_of(tmp_path, theirs, rename=lambda name: re.sub(r"(layers?\.\d+\.)", r"\1_orig_mod.", name))
    ours = build_model(EncoderConfig(), 99, init_from=tmp_path).eval()
    assert difference(ours, theirs, segments=make is bert) <= 1e-4


def test_an_untied_output_is_read_if_it_is_the_embedding_and_else_refused(tmp_path):
    theirs = bert()
    table, bias = (
        x.detach().clone() for x in (theirs.bert.embeddings.word_embeddings.weight, theirs.cls.predictions.bias)
    )
    matrix, other = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"

    def untied(settings):
        return settings | {"tie_word_embeddings": False}

    assert agrees(folder_of(tmp_path / "a", theirs, add={matrix: table}))
    assert agrees(folder_of(tmp_path / "b", theirs, add={matrix: table, other: bias}, config=untied))
    for number, (config, add, message) in enumerate(
        [
            (None, {matrix: table * 2}, "is another matrix than the token embedding, which is not supported"),
            (untied, {matrix: table * 2, other: bias}, "is another matrix than the token embedding"),
            (untied, {}, f"tie_word_embeddings is false in config.json, but the weights lack {matrix}"),
        ]
    ):
        with pytest.raises(UserError, match=message):
            read_huggingface(folder_of(tmp_path / str(number), theirs, add=add, config=config)).read_weights()
    modern = modernbert()
    add = {"decoder.weight": modern.model.embeddings.tok_embeddings.weight.detach() * 2}
    with pytest.raises(UserError, match=r"decoder\.weight, the output, is another matrix"):
        read_huggingface(folder_of(tmp_path / "modern", modern, add=add)).read_weights()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_pointers_of_git_lfs_are_told(tmp_path, name):
    bert().save_pretrained(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 440473133\n")
    with pytest.raises(UserError, match=rf"{name}: a git-lfs pointer, not the file\. Run git lfs pull"):
        read_huggingface(tmp_path).read_weights()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(32, dtype=torch.int64), "is of int64, not of a floating type"),
        (torch.full((32,), float("nan")), "holds numbers that are not finite"),
        (torch.ones(()), r"has shape \[\], config\.json asks for \[32\]"),
    ],
)
def test_weights_that_are_no_numbers_are_named(tmp_path, tensor, message):
    norm = "bert.encoder.layer.4.output.LayerNorm.weight"
    with pytest.raises(UserError, match=rf"{norm} {message}"):
        read_huggingface(folder_of(tmp_path, bert(), add={norm: tensor})).read_weights()
