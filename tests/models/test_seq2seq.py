import pytest
import torch
from torch.nn import functional as F

from leanbert.errors import UserError
from leanbert.memory.checkpointing import run_block, set_checkpointing
from leanbert.models.seq2seq import Seq2SeqModel
from leanbert.pretrained.build import build_model, initialise, load_weights
from tests.pretrained.pairs import pack, packed_batch, some_pairs, tiny_seq2seq
from tests.tiny import VOCABULARY, tiny_config

PRESETS = pytest.mark.parametrize("preset", ["bert", "modern"])
COPY = pytest.mark.parametrize("copy", [False, True])


def logits_of(model, batch):
    return model(batch.inputs, batch.decoder_inputs)


def loss_of(model, batch, smoothing=0.1):
    return model.loss_sum(batch.inputs, batch.decoder_inputs, batch.targets, smoothing)


def gradients(model, batch):
    loss_of(model, batch).backward()
    values = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return values


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9 * float(expected[name].abs().max()))


@PRESETS
@COPY
@pytest.mark.parametrize("position", ["learned", "rotary", "sinusoidal"])
def test_packed_pairs_equal_pairs_alone(preset, position, copy):
    model, pairs = tiny_seq2seq(preset=preset, position=position, copy=copy), some_pairs(5)
    together = logits_of(model, pack([pairs[:3], pairs[3:]], 32, 32))
    assert together.isfinite().all()
    for row, own in enumerate((pairs[:3], pairs[3:])):
        begin = 0
        for source, target in own:
            alone = logits_of(model, pack([[(source, target)]], len(source), len(target) - 1))
            assert alone.shape == (1, len(target) - 1, VOCABULARY)
            there = together[row : row + 1, begin : begin + len(target) - 1]
            torch.testing.assert_close(there, alone, rtol=1e-9, atol=1e-9)
            begin += len(target) - 1


@PRESETS
@COPY
def test_neighbours_and_padding_do_not_change_a_pair_at_all(preset, copy):
    """Bit for bit: what is masked has probability 0."""
    model, pairs = tiny_seq2seq(preset=preset, copy=copy), some_pairs(3, longest=5)
    batch = pack([pairs], 32, 32)
    source, target = len(pairs[0][0]), len(pairs[0][1]) - 1
    other = pack([[pairs[0], *some_pairs(2, seed=5, longest=5)]], 32, 32)
    noise = pack([pairs[:1]], 32, 32)
    noise.inputs.input_ids[0, source:], noise.decoder_inputs.input_ids[0, target:] = 77, 55
    expected = logits_of(model, batch)[0, :target]
    for changed in (other, noise):
        assert not torch.equal(logits_of(model, changed)[0, target:], logits_of(model, batch)[0, target:])
        assert torch.equal(logits_of(model, changed)[0, :target], expected)


@PRESETS
def test_a_target_sees_its_past_and_its_whole_source(preset):
    model, ((source, target),) = tiny_seq2seq(preset=preset), some_pairs(1, seed=3)
    expected = logits_of(model, pack([[(source, target)]], 16, 16))[0]
    later = [*target[:-2], 99, target[-1]]
    changed = logits_of(model, pack([[(source, later)]], 16, 16))[0]
    last = len(target) - 2  # the place that reads the changed token
    assert torch.equal(changed[:last], expected[:last])
    assert not torch.isclose(changed[last], expected[last]).all()
    for place in range(len(source)):
        other = [*source[:place], 98, *source[place + 1 :]]
        assert not torch.isclose(logits_of(model, pack([[(other, target)]], 16, 16))[0, 0], expected[0]).all()


@PRESETS
def test_the_loss_is_the_smoothed_cross_entropy_of_the_logits(preset):
    model, batch = tiny_seq2seq(preset=preset), packed_batch()
    logits = logits_of(model, batch).flatten(0, 1)
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits, batch.targets.flatten(), reduction="sum", label_smoothing=smoothing)
        assert loss_of(model, batch, smoothing).item() == pytest.approx(expected.item(), rel=1e-10)


@PRESETS
def test_with_a_pointer_the_loss_is_that_of_both_parts(preset):
    model, batch = tiny_seq2seq(preset=preset, copy=True), packed_batch()
    log_probs = logits_of(model, batch)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(4, 30, dtype=torch.float64))
    expected = F.nll_loss(log_probs.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    assert loss_of(model, batch, 0.0).item() == pytest.approx(expected.item(), rel=1e-10)
    with torch.no_grad():
        model.pointer.gate.bias.fill_(-50.0)  # nothing is copied
    alone = tiny_seq2seq(preset=preset)
    alone.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("pointer.")})
    assert loss_of(model, batch, 0.0).item() == pytest.approx(loss_of(alone, batch, 0.0).item(), rel=1e-10)


@PRESETS
@COPY
@pytest.mark.parametrize("start", ["random", "shared"])
@pytest.mark.parametrize(
    ("technique", "value"),
    [("keep", "input"), ("keep", "products"), ("slice_rows", 1), ("slice_rows", 3), ("head_chunk", 7)],
)
def test_techniques_leave_all_gradients_as_they_are(preset, copy, start, technique, value):
    model, batch = tiny_seq2seq(preset=preset, start=start, copy=copy), packed_batch()
    expected = gradients(model, batch)
    if technique == "keep":
        assert set_checkpointing(model.blocks, value) == 4
    elif technique == "head_chunk":
        model.head_chunk = value
    else:
        for block in model.blocks:
            block.slice_rows = value
    assert_same(gradients(model, batch), expected)


@PRESETS
@pytest.mark.parametrize("switch", [("keep", "input"), ("keep", "products"), ("slice_rows", 3)])
def test_the_gradient_of_the_memory_is_the_same(preset, switch):
    model, batch = tiny_seq2seq(preset=preset), packed_batch()
    block = model.decoder.blocks[1]
    generator = torch.Generator().manual_seed(0)
    hidden, memory = (
        torch.randn(4, length, 32, generator=generator, dtype=torch.float64).requires_grad_() for length in (30, 32)
    )
    context = model.decoder.make_context(batch.decoder_inputs, batch.inputs.document_ids, hidden)
    upstream = torch.randn(4, 30, 32, generator=generator, dtype=torch.float64)
    inputs = (hidden, memory, *block.parameters())
    expected = torch.autograd.grad(block(hidden, context, memory), inputs, upstream)
    setattr(block, *switch)
    found = torch.autograd.grad(run_block(block, hidden, context, memory), inputs, upstream)
    assert expected[1].abs().max() > 0
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("switch", [("keep", "input"), ("keep", "products"), ("slice_rows", 2)])
def test_dropout_in_the_backward_pass_is_that_of_the_forward_pass(switch):
    """Else the derivative, here of a cross-attention's and of an encoder's weight, would be wrong."""
    model, batch = tiny_seq2seq(preset="bert", dropout=0.2, attention_dropout=0.2), packed_batch()
    for block in model.blocks:
        setattr(block, *switch)
    for weight in (
        model.decoder.blocks[0].cross_attention.key_value.weight,
        model.encoder.blocks[0].attention.qkv.weight,
    ):

        def loss():
            torch.manual_seed(4)
            return loss_of(model, batch)

        model.zero_grad()
        loss().backward()
        slope, step = weight.grad[3, 5].item(), 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[3, 5] += sign * step
            values.append(loss().item())  # with gradients: else blocks do not run in slices
            with torch.no_grad():
                weight[3, 5] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-3)


# ---- a vocabulary of targets


@PRESETS
def test_two_equal_embeddings_are_one_whose_gradients_are_added(preset):
    joint, separate = tiny_seq2seq(preset=preset), tiny_seq2seq(preset=preset, targets=VOCABULARY)
    one, own = "encoder.embeddings.token.weight", "decoder.embeddings.token.weight"
    weights = joint.state_dict()
    separate.load_state_dict({**weights, own: weights[one]})
    batch = packed_batch()
    assert torch.equal(logits_of(separate, batch), logits_of(joint, batch))
    found = gradients(separate, batch)
    found[one] = found[one] + found.pop(own)
    assert_same(found, gradients(joint, batch))


@PRESETS
def test_a_vocabulary_of_targets(preset):
    """70 tokens, 128 rows: logits, smoothing and the chunked head count the tokens only."""
    model, batch = tiny_seq2seq(preset=preset, targets=70), packed_batch(targets=70)
    logits = logits_of(model, batch)
    assert logits.shape == (4, 30, 70)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum", label_smoothing=0.1)
    assert loss_of(model, batch).item() == pytest.approx(expected.item(), rel=1e-10)
    wanted = gradients(model, batch)
    assert wanted["decoder.embeddings.token.weight"][70:].abs().max() == 0
    model.head_chunk = 7
    assert_same(gradients(model, batch), wanted)
    initialise(model.float())
    tables = [(len(table), tokens, int((table.abs().sum(1) > 0).sum())) for table, tokens in model.token_tables]
    assert tables == [(128, 100, 100), (128, 70, 70)]


@PRESETS
@pytest.mark.parametrize("start", ["encoder", "shared", "random"])
def test_a_vocabulary_of_targets_starts_from_an_encoder_without_its_embedding_and_head(tmp_path, preset, start):
    from leanbert.pretrained.huggingface.convert import write_huggingface
    from tests.tiny import tiny_model

    source = tiny_model(torch.float32, preset=preset)
    write_huggingface(source, tmp_path, {})
    torch.manual_seed(1)
    model = build_model(
        tiny_config(), VOCABULARY, lambda config: Seq2SeqModel(config, None, start, target_vocab_size=70),
        init_from=tmp_path,
    )  # fmt: skip
    theirs, own = source.state_dict(), model.state_dict()
    rows = {"encoder.embeddings.token.weight": VOCABULARY}
    assert all(torch.equal(own[n][: rows.get(n)], w[: rows.get(n)]) for n, w in theirs.items() if n[:7] == "encoder")
    assert not torch.equal(own["head.dense.weight"], theirs["head.dense.weight"])
    table = own["decoder.embeddings.token.weight"]
    assert (table[:70] - theirs["encoder.embeddings.token.weight"][:70]).abs().min(1).values.max() > 1e-4
    copied = torch.equal(model.decoder.embeddings.norm.weight, source.encoder.embeddings.norm.weight)
    query = model.decoder.blocks[1].cross_attention.query.weight
    assert copied == torch.equal(query, source.encoder.blocks[1].attention.qkv.weight[:32]) == (start != "random")


# ---- where the weights come from


def test_cross_attention_begins_with_the_queries_of_self_attention_and_passes_on_what_it_reads():
    model = tiny_seq2seq(preset="bert", start="encoder", num_layers=4, layers=2)
    model.warm_start()
    for block, layer in zip(model.decoder.blocks, (0, 2), strict=True):
        source = model.encoder.blocks[layer]
        cross, own = block.cross_attention, source.attention
        for kind in ("weight", "bias"):
            together = torch.cat((getattr(cross.query, kind), getattr(cross.key_value, kind)[:32]))
            assert torch.equal(together, getattr(own.qkv, kind)[:64])
        memory = torch.randn(1, 1, 32, dtype=torch.float64)
        hidden, mask = torch.randn(1, 1, 32, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        cross.eval()
        torch.testing.assert_close(cross(hidden, *cross.project(memory), mask), 0.49 * memory)
        for part in ("attention", "attention_norm", "feed_forward", "feed_forward_norm"):
            copied, original = getattr(block, part).state_dict(), getattr(source, part).state_dict()
            assert all(torch.equal(copied[name], original[name]) for name in original)
            mine, theirs = (set(map(id, getattr(owner, part).parameters())) for owner in (block, source))
            assert not mine & theirs
    assert torch.equal(model.decoder.embeddings.position.weight, model.encoder.embeddings.position.weight)
    assert torch.equal(model.decoder.embeddings.norm.weight, model.encoder.embeddings.norm.weight)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_warm_start_of_the_modern_preset_with_any_number_of_blocks(layers):
    model = tiny_seq2seq(start="encoder", num_layers=2, layers=layers)
    model.warm_start()
    for number, block in enumerate(model.decoder.blocks):
        source = model.encoder.blocks[number * 2 // layers]
        assert torch.equal(block.attention.qkv.weight, source.attention.qkv.weight)
        assert torch.equal(block.cross_attention.query.weight, source.attention.qkv.weight[:32])
    assert torch.equal(model.decoder.final_norm.weight, model.encoder.final_norm.weight)
    assert logits_of(model, packed_batch()).isfinite().all()


def test_a_pointer_begins_by_looking_at_what_is_like_the_decoders_state():
    model = tiny_seq2seq(start="encoder", copy=True)
    model.warm_start()
    memory = torch.randn(1, 6, 32, dtype=torch.float64)
    copied = model.pointer(
        memory, model.pointer.read(memory, torch.arange(6)[None], torch.ones(1, 1, 6, dtype=torch.bool))
    )
    assert copied.probs.argmax(-1).tolist() == [list(range(6))]


@COPY
def test_a_random_decoder_is_left_alone(copy):
    model = tiny_seq2seq(start="random", copy=copy)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.warm_start()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@PRESETS
def test_a_shared_decoder_has_the_encoders_weights_once(preset):
    model = tiny_seq2seq(preset=preset, start="shared")
    for block, source in zip(model.decoder.blocks, model.encoder.blocks, strict=True):
        assert block.attention is source.attention
        assert block.feed_forward is source.feed_forward
        assert block.feed_forward_norm is source.feed_forward_norm
    own = tiny_seq2seq(preset=preset, start="random")
    shared = {
        id(p)
        for block in model.encoder.blocks
        for part in (block.attention, block.attention_norm, block.feed_forward, block.feed_forward_norm)
        for p in part.parameters()
    }
    saved = sum(p.numel() for p in model.parameters() if id(p) in shared)
    assert own.num_parameters - model.num_parameters == saved
    before = model.encoder.blocks[0].attention.qkv.weight
    model.warm_start()
    assert model.decoder.blocks[0].attention.qkv.weight is before
    assert torch.equal(model.decoder.blocks[0].cross_attention.query.weight, before[:32])


def test_a_shared_model_is_stored_and_read_again(tmp_path):
    model, batch = tiny_seq2seq(start="shared"), packed_batch()
    other = tiny_seq2seq(start="shared", seed=1)
    load_weights(other, model.state_dict(), tmp_path)
    assert torch.equal(logits_of(other, batch), logits_of(model, batch))


def test_the_number_of_parameters_is_that_of_the_parts():
    """bert, 2 + 2 blocks of width 32, 100 tokens (128 rows are stored): counted by hand."""
    width, inner, vocabulary, positions = 32, 128, 100, 32
    norm = 2 * width
    attention = 4 * (width**2 + width)
    feed_forward = width * inner + inner + inner * width + width
    encoder = vocabulary * width + positions * width + 2 * width + norm + 2 * (attention + feed_forward + 2 * norm)
    decoder = positions * width + 2 * width + norm + 2 * (2 * attention + feed_forward + 3 * norm)
    head = width**2 + width + norm + vocabulary
    assert tiny_seq2seq(preset="bert").num_parameters == encoder + decoder + head
    assert tiny_seq2seq(preset="bert", targets=70).num_parameters == encoder + decoder + 70 * width + head - 30


@PRESETS
@COPY
@pytest.mark.parametrize("start", ["random", "encoder", "shared"])
def test_every_weight_is_trained_cross_attention_too(preset, copy, start):
    """bert2bert recipes fail where the cross-attention stays as it began."""
    torch.manual_seed(0)
    model = build_model(
        tiny_config(preset=preset), VOCABULARY, lambda config: Seq2SeqModel(config, None, start, copy=copy)
    )
    model.warm_start()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, batch, losses = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0), packed_batch(), []
    for _ in range(20):
        loss = loss_of(model, batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    moved = {name: float((p - before[name]).norm()) for name, p in model.named_parameters()}
    assert min(moved.values()) > 1e-3, min(moved, key=moved.get)
    for name, parameter in model.named_parameters():
        if "cross_attention." in name and name.endswith("weight"):
            assert float((parameter - before[name]).abs().median()) > 1e-4, name


def test_weights_of_a_masked_language_model_start_encoder_decoder_and_head(tmp_path):
    from leanbert.pretrained.huggingface.convert import write_huggingface
    from tests.tiny import tiny_model

    source = tiny_model(torch.float32, preset="bert")
    write_huggingface(source, tmp_path, {})
    model = build_model(
        tiny_config(), VOCABULARY, lambda config: Seq2SeqModel(config, None, "encoder"), init_from=tmp_path
    )
    assert torch.equal(model.encoder.blocks[1].attention.qkv.weight, source.encoder.blocks[1].attention.qkv.weight)
    assert torch.equal(model.head.dense.weight, source.head.dense.weight)
    query = model.decoder.blocks[1].cross_attention.query.weight
    assert torch.equal(query, source.encoder.blocks[1].attention.qkv.weight[:32])


def test_targets_beyond_the_positions_are_refused():
    model, batch = tiny_seq2seq(), pack([some_pairs(1)], 16, 33)
    with pytest.raises(UserError, match=r"data\.max_length: 33 tokens"):
        logits_of(model, batch)


def test_initialising_keeps_the_padding_rows_at_zero():
    model = tiny_seq2seq()
    initialise(model)
    table = model.encoder.embeddings.token.weight
    loss_of(model, packed_batch()).backward()
    assert table[VOCABULARY:].abs().max() == 0
    assert table.grad[VOCABULARY:].abs().max() == 0
    assert model.head.bias.grad[VOCABULARY:].abs().max() == 0
