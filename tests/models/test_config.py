import math
from dataclasses import asdict, fields, replace

import pytest

from leanbert.errors import UserError
from leanbert.models.config import RANGES, EncoderConfig


def test_presets_fill_what_is_left_open():
    bert = EncoderConfig(preset="bert").resolved()
    assert (bert.position, bert.norm_position, bert.activation, bert.bias) == ("learned", "post", "gelu", True)
    assert (bert.intermediate_size, bert.type_vocab_size, bert.dropout, bert.norm_eps) == (1024, 2, 0.1, 1e-12)
    modern = EncoderConfig(preset="modern").resolved()
    assert (modern.position, modern.norm_position, modern.activation) == ("rotary", "pre", "geglu")
    assert (modern.intermediate_size, modern.type_vocab_size, modern.dropout) == (682, 0, 0.0)


def test_what_is_set_wins_over_the_preset():
    config = EncoderConfig(preset="bert", dropout=0.0, bias=False, type_vocab_size=0).resolved()
    assert (config.dropout, config.bias, config.type_vocab_size) == (0.0, False, 0)


def test_settings_survive_a_dictionary():
    config = EncoderConfig(preset="bert", local_window=16, vocab_size=77).resolved()
    assert EncoderConfig(**asdict(config)).resolved() == config


def test_heads_need_not_fill_the_hidden_size_where_their_width_is_set():
    assert EncoderConfig(hidden_size=768, num_heads=12).resolved().head_size == 64
    config = EncoderConfig(hidden_size=768, num_heads=5, head_size=64).resolved()
    assert (config.num_heads, config.head_size) == (5, 64)


def test_settings_stored_before_head_size_existed_still_load():
    stored = asdict(EncoderConfig(hidden_size=48, num_heads=3).resolved())
    del stored["head_size"]
    assert EncoderConfig(**stored).resolved().head_size == 16


def test_local_layers_lie_between_global_ones():
    config = EncoderConfig(num_layers=5, local_window=8, global_every=2).resolved()
    assert [config.is_local(layer) for layer in range(5)] == [False, True, False, True, False]
    assert not any(EncoderConfig().resolved().is_local(layer) for layer in range(4))


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("hidden_size", {"hidden_size": 10, "num_heads": 4}),
        ("num_heads", {"hidden_size": 12, "num_heads": 4}),
        ("hidden_size", {"hidden_size": 5, "num_heads": 1, "position": "sinusoidal"}),
        ("num_layers", {"num_layers": 0}),
        ("num_heads", {"num_heads": 0}),
        ("head_size", {"head_size": 0}),
        ("head_size", {"hidden_size": 16, "head_size": 18}),
        ("num_heads", {"num_heads": 4, "head_size": 7}),
        ("preset", {"preset": "gpt"}),
        ("position", {"position": "alibi"}),
        ("activation", {"activation": "relu"}),
        ("norm_position", {"norm_position": "both"}),
        ("dropout", {"dropout": 1.0}),
        ("attention_dropout", {"attention_dropout": -0.1}),
        ("norm_eps", {"norm_eps": 0.0}),
        ("local_window", {"local_window": -1}),
        ("global_every", {"global_every": 0}),
    ],
)
def test_bad_settings_are_named(setting, values):
    with pytest.raises(UserError, match=rf"^model\.encoder\.{setting}: [^\n]*$"):
        EncoderConfig(**values).resolved()


NEVER = ("4", None, [4], {"a": 4}, True, math.nan, math.inf, -math.inf, -1)
"""What is no value of any number here; None stands for "as the preset has it" where that is allowed."""
OPEN = {field.name for field in fields(EncoderConfig) if field.default is None}


@pytest.mark.parametrize("setting", RANGES)
def test_every_number_has_a_range(setting):
    for value in (*NEVER, *(() if "dropout" in setting or setting in FLOATS else (1.5, 10**9, 10**400))):
        if value is not None or setting not in OPEN:
            with pytest.raises(UserError, match=rf"^model\.encoder\.{setting}: [^\n]* is out of range\. Give [^\n]*$"):
                replace(EncoderConfig(head_size=64), **{setting: value}).resolved()


FLOATS = ("norm_eps", "rotary_theta", "local_rotary_theta")


@pytest.mark.parametrize("setting", ["preset", "position", "norm_position", "activation", "bias"])
def test_every_choice_is_checked(setting):
    for value in (["bert"], {}, 0, 1, math.nan, "no", b"post"):
        with pytest.raises(UserError, match=rf"^model\.encoder\.{setting}: [^\n]* is unknown\. Choose from [^\n]*$"):
            replace(EncoderConfig(), **{setting: value}).resolved()


def test_a_model_that_no_machine_holds_is_refused():
    assert EncoderConfig(num_layers=100, hidden_size=8192).resolved().num_layers == 100
    with pytest.raises(UserError, match=r"^model\.encoder: these sizes make a model of 1\.3e\+13 weights"):
        EncoderConfig(num_layers=1000, hidden_size=2**15).resolved()


def test_rows_longer_than_the_positions_are_refused():
    config = EncoderConfig(max_positions=128).resolved()
    config.check_length(128)
    with pytest.raises(UserError, match=r"^data\.max_length: 129 tokens, but the model has 128 positions"):
        config.check_length(129)
