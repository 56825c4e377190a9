"""The order of layers, and the choice of those that stay in 32 bits, on metrics that are made up."""

import json
import math
import shlex

import pytest
import torch

from leanbert.api import Pretrained, load
from leanbert.compression.onnx.folder import largest_difference
from leanbert.compression_report import command
from leanbert.compression_report.command import run_compress
from leanbert.compression_report.report import answer_of
from leanbert.compression_report.request import CompressRequest
from leanbert.compression_report.sensitivity import (
    Choice,
    Effect,
    Sensitivity,
    choose_exceptions,
    effects_of,
    relative_drop,
)
from leanbert.compression_report.variants import Source
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from tests.compression.onnx.models import make

COSTS = {"a": 0.01, "b": 0.2, "c": 0.0, "d": -0.02}


def accuracy(costs):
    """Return what judges a model whose quantized layers cost so much each, of 0.8; it counts calls."""
    calls = []

    def value(exceptions):
        calls.append(list(exceptions))
        return 0.8 - sum(cost for layer, cost in costs.items() if layer not in exceptions)

    value.calls = calls
    return value


@pytest.mark.parametrize(("sign", "order"), [(-1.0, "bacd"), (1.0, "dcab")])
def test_each_layer_is_quantized_alone_and_the_most_sensitive_is_first(sign, order):
    value = accuracy(COSTS)
    before, effects = effects_of(list(COSTS), value, sign)
    assert before == 0.8
    assert "".join(effect.layer for effect in effects) == order
    assert value.calls == [["a", "b", "c", "d"], ["b", "c", "d"], ["a", "c", "d"], ["a", "b", "d"], ["a", "b", "c"]]
    found = {effect.layer: effect for effect in effects}
    assert found["b"].metric == pytest.approx(0.6)
    assert found["b"].drop == pytest.approx(-sign * 0.25)


def test_a_layer_that_breaks_the_model_is_the_most_sensitive():
    effects = effects_of(list(COSTS), accuracy({**COSTS, "c": math.nan}), -1.0)[1]
    assert [effect.layer for effect in effects] == ["c", "b", "a", "d"]


@pytest.mark.parametrize(
    ("most", "exceptions", "drop"),
    [(0.3, ["b"], 0.1), (0.1, ["b"], 0.1), (0.09, ["b", "a"], 0.05), (0.03, ["b", "a", "c"], 0.02)],
)
def test_layers_are_left_out_one_after_the_other_until_the_drop_holds(most, exceptions, drop):
    costs = {"b": 0.2, "a": 0.05, "c": 0.03, "d": 0.02}
    tried = []

    def dropped(left):
        tried.append(left)
        return round(sum(cost for layer, cost in costs.items() if layer not in left), 9)

    assert choose_exceptions(list(costs), dropped, most) == Choice(exceptions, drop, kept=True)
    assert tried == [list(costs)[: count + 1] for count in range(len(exceptions))]  # and no more


@pytest.mark.parametrize(
    ("drops", "choice"),
    [
        ([0.5, 0.2, 0.3], Choice(["a", "b"], 0.2, kept=False)),  # more left out is not always better
        ([0.5, math.nan, 0.3], Choice(["a", "b", "c"], 0.3, kept=False)),
        ([0.5, 0.6, 0.1], Choice(["a", "b", "c"], 0.1, kept=True)),
        ([-0.1, 0.6, 0.6], Choice(["a"], -0.1, kept=True)),
    ],
)
def test_where_nothing_keeps_the_drop_the_nearest_is_said(drops, choice):
    assert choose_exceptions(list("abcd"), lambda left: drops[len(left) - 1], 0.1) == choice
    layers = ", ".join(choice.exceptions)
    assert choice.in_words() == (
        f"With {layers} in 32 bits the drop is {choice.drop:.2%}"
        if choice.kept
        else f"No layers left in 32 bits keep the drop; the nearest, with {layers}, has {choice.drop:.2%}"
    )


def test_where_nothing_but_nan_comes_out_nothing_is_kept():
    assert not choose_exceptions(list("abc"), lambda left: math.nan, 0.1).kept


def test_the_section_of_the_report_is_a_table_with_signs_of_the_metric():
    effects = [Effect("encoder.blocks.0.attention.qkv", 0.6, 0.25), Effect("head", 0.82, -0.025)]
    text = Sensitivity("int8", 0.8, effects, Choice(["head"], 0.004, kept=True)).in_words("val/accuracy")
    assert text.splitlines() == [
        "## Sensitivity of int8", "",
        "Each layer quantized alone; val/accuracy with all in 32 bits: 0.8000.", "",
        "With head in 32 bits the drop is 0.40%.", "",
        "| layer | val/accuracy | change |", "| --- | --- | --- |",
        r"| encoder.blocks.0.attention.qkv | 0.6000 | -25.00% |", "| head | 0.8200 | +2.50% |",
    ]  # fmt: skip


def test_a_drop_is_relative_and_has_the_sign_of_the_metric():
    assert relative_drop(3.0, 2.0, 1.0) == 0.5
    assert relative_drop(3.0, 2.0, -1.0) == -0.5
    assert relative_drop(3.0, 0.0, 1.0) == 0.0


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A model of which the output layer has one large weight, judged by how far what it computes is from it."""
    monkeypatch.setattr(command, "peak_memory", lambda path: (1, 1))  # processes, which take time
    monkeypatch.setattr(command, "answer_of", lambda rows, *more: answer_of([row for row in rows if row.steps], *more))
    model, metadata = make("tagging")
    with torch.no_grad():
        model.head.scores.weight[0, 0] = 40.0
    Pretrained(model, TextTokenizer.train(lambda: ["a b c"], vocab_size=100), metadata).export(tmp_path / "given")
    plain = load(tmp_path / "given").model

    def evaluate(other, test=True):
        return {"val/loss": 1.0 if other is None else 1.0 + largest_difference(plain, other.eval())}

    return Source(tmp_path / "given", evaluate, lambda model: None, None, "val/loss", 1.0, 0)


def compress(tmp_path, source, steps=("quantize=int4",), **settings):
    output = tmp_path / "out"
    request = CompressRequest(output=output, steps=list(steps), seconds=0.01, **settings)
    try:
        run_compress(request, source, "again")
    finally:
        found = json.loads((output / "report.json").read_text())
    return found


@pytest.mark.slow
def test_layers_are_left_out_for_a_stated_drop_and_the_command_says_which(tmp_path, source, capsys):
    with pytest.raises(UserError, match=r"^compress: no variant keeps the limits\. The nearest, int4, has a drop"):
        compress(tmp_path, source, max_drop="0.000001%")
    (layers,) = json.loads((tmp_path / "out/report.json").read_text())["sensitivity"]
    assert not layers["choice"]["kept"]
    assert "No layers left in 32 bits keep the drop" in (tmp_path / "out/report.md").read_text()
    order = [effect["layer"] for effect in layers["effects"]]
    drops = [effect["drop"] for effect in layers["effects"]]
    assert len(order) == 1 + 2 * 4 + 2
    assert drops == sorted(drops, reverse=True)
    assert drops[-1] > 1e-4 > abs(layers["metric"] - 1.0)
    capsys.readouterr()

    whole = load(tmp_path / "out/int4").model
    most = 0.8 * (source.evaluate(whole)["val/loss"] - 1.0)
    report = compress(tmp_path, source, max_drop=f"{100 * most:.6f}%")
    choice, rows = report["sensitivity"][0]["choice"], {row["name"]: row for row in report["variants"]}
    exceptions = choice["exceptions"]
    name = f"int4-except-{len(exceptions)}"
    assert exceptions == order[: len(exceptions)]
    assert rows[name]["exceptions"] == exceptions
    assert rows[name]["drop"] == pytest.approx(choice["drop"], rel=1e-6)
    assert rows[name]["drop"] <= most < rows["int4"]["drop"]
    assert rows["int4"]["size_bytes"] < rows[name]["size_bytes"]
    assert report["answer"].startswith(f"Take {name}: ")
    again = shlex.split(report["answer"].partition("Made again by: ")[2])
    assert again[:2] == ["again", "--steps"]
    assert again[3] == "--exceptions"
    written = (tmp_path / "out" / name / "model.onnx").read_bytes()

    report = compress(tmp_path, source, json.loads(again[2]), exceptions=json.loads(again[4]))
    assert report["sensitivity"] == []
    assert not (tmp_path / "out/int4").exists()  # the variants of the run before
    assert [row["name"] for row in report["variants"] if row["steps"]] == [name]
    assert (tmp_path / "out" / name / "model.onnx").read_bytes() == written


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": None, "exceptions": ["head"]}, "exceptions: of which steps"),
        ({"steps": ["blocks=0.5"], "exceptions": ["head"]}, "exceptions: no step quantizes. Add quantize=int8"),
        ({"steps": ["blocks=0.5"], "sensitivity": True}, "sensitivity: no step quantizes. Add quantize=int8"),
    ],
)
def test_what_nothing_is_asked_of_is_an_error(tmp_path, settings, message):
    with pytest.raises(UserError) as caught:
        run_compress(CompressRequest(output=tmp_path / "out", **settings), None, "again")
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "out").exists()
