"""Folders of Hugging Face with one thing changed: read as transformers reads them, or refused in one line."""

import json
import math
import random
import time
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from leanbert.errors import UserError
from leanbert.pretrained.build import read_model, rebuild
from leanbert.pretrained.huggingface.convert import write_huggingface
from tests.pretrained.huggingface.test_convert import bert, inputs, modernbert
from tests.pretrained.huggingface.test_tasks import seq2seq
from tests.tiny import whole_rows

COUNT = 60
"""Mutated folders of each kind."""
ODD = (
    None, True, False, 0, -1, 1, 2, 3, 2.0, 2.5, 1e300, math.nan, math.inf, 10**9, 10**40, "", "3", "bert", "gelu",
    "wide", [], [3], ["BertForMaskedLM"], {}, {"a": 1}, [[[]]],
)  # fmt: skip
KINDS = {
    "bert": lambda: bert(num_hidden_layers=2),
    "modernbert": lambda: modernbert(num_hidden_layers=3),
    "classifier": lambda: bert(transformers.BertForSequenceClassification, num_hidden_layers=2, num_labels=3),
    "tagger": lambda: modernbert(transformers.ModernBertForTokenClassification, num_hidden_layers=3),
    "pair": seq2seq,
}


def logits(model, ours):
    ids, real, _ = inputs()
    with torch.no_grad():
        if not ours and isinstance(model, transformers.EncoderDecoderModel):
            return model(input_ids=ids, attention_mask=real, decoder_input_ids=ids[:, :9]).logits
        if not ours:
            found = model(ids, attention_mask=real).logits
            return found if found.dim() == 2 else found * real[:, :, None]
        if model.task == "seq2seq":
            return model(whole_rows(ids, real), whole_rows(ids[:, :9]))
        found = model(whole_rows(ids, real))
        return found[:, 0] if getattr(model, "of", "") == "text" else found * real[:, :, None]


def change_settings(folder, chance):
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    part = settings
    while (inner := [value for value in part.values() if isinstance(value, dict) and value]) and chance.random() < 0.5:
        part = chance.choice(inner)
    name = chance.choice(list(part))
    if chance.random() < 0.2:
        del part[name]
    else:
        part[name] = chance.choice(ODD)
    path.write_text(json.dumps(settings))
    return f"{name} of config.json"


def change_bytes(folder, chance):
    path = chance.choice([folder / "model.safetensors", folder / "config.json"])
    content = bytearray(path.read_bytes())
    kind = chance.choice(("cut", "flip", "insert", "empty", "missing"))
    if kind == "missing":
        path.unlink()
        return f"{path.name} missing"
    place = chance.randrange(len(content) if chance.random() < 0.5 else min(9, len(content)))
    if kind == "cut":
        del content[place:]
    elif kind == "flip":
        content[place] ^= 1 << chance.randrange(8)
    elif kind == "insert":
        content[place:place] = chance.randbytes(3)
    else:
        content.clear()
    path.write_bytes(content)
    return f"{kind} at {place} of {path.name}"


def change_weights(folder, chance):
    path = folder / "model.safetensors"
    state = load_file(path)
    name = chance.choice(list(state))
    kinds = ("lost", "long", "short", "flat", "scalar", "integer", "half", "double", "renamed", "more", "nan")
    kind = chance.choice(kinds)
    tensor = state.pop(name)
    changed = {
        "long": lambda: torch.cat((tensor, tensor)),
        "short": lambda: tensor[:-1],
        "flat": tensor.flatten,
        "scalar": lambda: tensor.sum(),
        "integer": tensor.long,
        "half": tensor.bfloat16,
        "double": tensor.double,
        "nan": lambda: torch.full_like(tensor, math.nan),
    }
    if kind in changed:
        state[name] = changed[kind]().clone().contiguous()
    elif kind == "renamed":
        state[name + ".old"] = tensor
    elif kind == "more":
        state |= {name: tensor, f"{name}.gamma": tensor.clone()}
    save_file(state, path, metadata={"format": "pt"})
    return f"{name} {kind}"


def read(folder):
    """Return the logits of our model, or the reason why there are none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return logits(rebuild(read_model(folder), 99).eval(), ours=True)
    except UserError as error:
        return str(error)


CHANGES = (change_settings, change_settings, change_bytes, change_weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_folder_is_read_as_transformers_does_or_refused(tmp_path, kind):
    model = KINDS[kind]()
    whole = tmp_path / "whole"
    if kind == "pair":
        write_huggingface(model, whole)
        model = transformers.EncoderDecoderModel.from_pretrained(whole).eval()
    else:
        model.save_pretrained(whole)
    files = {name: (whole / name).read_bytes() for name in ("config.json", "model.safetensors")}
    expected = logits(model, ours=False)
    outcomes = {"read": 0, "refused": 0}
    for seed in range(COUNT):
        chance = random.Random(seed)
        for name, content in files.items():
            (whole / name).write_bytes(content)
        what = chance.choice(CHANGES)(whole, chance)
        start = time.process_time()
        found = read(whole)
        assert time.process_time() - start < 1, (seed, what)
        outcomes["refused" if isinstance(found, str) else "read"] += 1
        if isinstance(found, str):
            assert "\n" not in found, (seed, what)
            assert str(whole) in found or "data.max_length" in found, (seed, what, found)
            continue
        if found.shape != expected.shape or (found - expected).abs().max() > 1e-4:
            theirs = type(model).from_pretrained(whole, dtype=torch.float32).eval()
            assert (found - logits(theirs, ours=False)).abs().max() <= 1e-3, (seed, what)
    assert min(outcomes.values()) > COUNT // 10, outcomes
