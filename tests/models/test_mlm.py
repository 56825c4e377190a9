from dataclasses import replace
from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from leanbert.errors import UserError
from leanbert.models.config import EncoderConfig
from leanbert.models.embeddings import sinusoidal_table
from leanbert.models.kernels.loss import cross_entropy_sum
from leanbert.models.packed_inputs import PackedInputs
from leanbert.pretrained.build import build_model
from tests.tiny import whole_rows

VOCABULARY = 99
SIZES = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 64}
BOUNDS = ((0, 9), (9, 20), (20, 24))


def tiny(**settings):
    torch.manual_seed(0)
    model = build_model(EncoderConfig(**(SIZES | settings)), VOCABULARY)
    with torch.no_grad():  # zero output projections would hide what the blocks do
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def packed():
    """Two rows of three documents, 24 tokens each, with what a loader gives."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([end - start for start, end in BOUNDS])
    return PackedInputs(
        torch.randint(VOCABULARY, (2, 24), generator=generator),
        torch.cat([torch.arange(length) for length in lengths]).expand(2, -1),
        torch.arange(3).repeat_interleave(lengths).expand(2, -1),
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
def test_a_document_does_not_touch_the_others(position, precision):
    model, inputs = tiny(position=position).eval(), packed()
    other = inputs.input_ids.clone()
    other[:, 9:20] = (other[:, 9:20] + 1) % VOCABULARY
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        before, after = model(inputs), model(replace(inputs, input_ids=other))
    assert torch.equal(before[:, :9], after[:, :9])
    assert torch.equal(before[:, 20:], after[:, 20:])
    assert not torch.isclose(before[:, 9:20], after[:, 9:20]).all(-1).any()


@pytest.mark.parametrize("preset", ["bert", "modern"])
def test_packed_documents_equal_documents_alone(preset):
    model, inputs = tiny(preset=preset).eval(), packed()
    together = model(inputs)
    for start, end in BOUNDS:
        alone = model(whole_rows(inputs.input_ids[:, start:end]))
        assert torch.allclose(together[:, start:end], alone, atol=1e-5)


def test_padding_is_finite_and_does_not_matter():
    model, inputs = tiny(preset="bert").train(), packed()
    inputs = replace(inputs, document_ids=inputs.document_ids.masked_fill(inputs.document_ids == 2, -1))
    logits = model(inputs)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_local_layers_see_their_window_only():
    model = tiny(num_layers=2, local_window=4, global_every=2).eval()
    ids = torch.randint(VOCABULARY, (1, 24))
    reach = [block for block in model.encoder.blocks]
    reach[0].attention.output.weight.data.zero_()  # silence the global layer
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % VOCABULARY
    touched = (model(whole_rows(ids)) != model(whole_rows(changed))).any(-1)[0].nonzero().flatten().tolist()
    assert touched == [8, 9, 10, 11, 12]


@pytest.mark.parametrize("preset", ["bert", "modern"])
def test_logits_at_targets_are_those_of_the_whole_row(preset):
    model, inputs = tiny(preset=preset).eval(), packed()
    index = torch.tensor([[0, 5, 23], [7, 7, 2]])
    chosen, whole = model(inputs, index), model(inputs)
    assert chosen.shape == (2, 3, VOCABULARY)
    assert whole.shape == (2, 24, VOCABULARY)
    expected = torch.stack([whole[row, index[row]] for row in range(2)])
    assert torch.allclose(chosen, expected, atol=1e-6)


def test_padding_rows_of_the_vocabulary_stay_zero():
    model, inputs = tiny(), packed()
    stored = model.encoder.embeddings.token.weight
    assert stored.shape == (128, 32)
    assert model.head.bias.shape == (128,)
    model(inputs).logsumexp(-1).sum().backward()
    assert stored.grad[VOCABULARY:].abs().max() == 0
    assert model.head.bias.grad[VOCABULARY:].abs().max() == 0
    assert stored.grad[:VOCABULARY].abs().sum(1).min() > 0


@pytest.mark.parametrize(
    ("preset", "position", "norm", "activation"),
    list(
        product(
            ("bert", "modern"),
            ("learned", "sinusoidal", "rotary"),
            ("post", "pre"),
            ("gelu", "geglu", "swiglu"),
        )
    ),
)
def test_every_combination_trains(preset, position, norm, activation):
    model = tiny(preset=preset, position=position, norm_position=norm, activation=activation, dropout=0.1)
    inputs = packed()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs, torch.tensor([[1, 2], [3, 4]]))
        loss = cross_entropy_sum(logits, torch.tensor([[5, 6], [7, -100]]))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_segments_count_and_default_to_zero():
    model, ids = tiny(preset="bert").eval(), torch.randint(VOCABULARY, (1, 8))
    plain, zeros, ones = (whole_rows(ids, None, segments) for segments in (None, ids * 0, ids * 0 + 1))
    assert torch.equal(model(plain), model(zeros))
    assert not torch.allclose(model(plain), model(ones))


@pytest.mark.parametrize("preset", ["bert", "modern"])
def test_runs_on_fake_tensors(preset):
    with FakeTensorMode():
        model = build_model(EncoderConfig(**SIZES, preset=preset), VOCABULARY)
        inputs = PackedInputs(*torch.zeros(3, 2, 24, dtype=torch.long))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs, torch.zeros(2, 3, dtype=torch.long))
            loss = cross_entropy_sum(logits, torch.zeros(2, 3, dtype=torch.long))
        loss.backward()
        assert logits.shape == (2, 3, VOCABULARY)
        assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


def test_rows_beyond_the_positions_are_refused():
    with pytest.raises(UserError, match=r"data\.max_length: 65 tokens, but the model has 64 positions"):
        tiny()(whole_rows(torch.zeros(1, 65, dtype=torch.long)))


def test_sinusoidal_table_has_the_size_of_learned_embeddings():
    table = sinusoidal_table(512, 64)
    assert table.shape == (512, 64)
    assert table.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-5)
    assert table[0].tolist() == pytest.approx([0.0, 0.02 * 2**0.5] * 32)
    assert table[1, 0].item() == pytest.approx(0.02 * 2**0.5 * torch.tensor(1.0).sin().item())
