import copy
import logging

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from leanbert.compression.structured import (
    Importance,
    head_importance,
    neuron_importance,
    prune_structured,
    sizes_kept,
    taylor_importance,
)
from leanbert.errors import UserError
from leanbert.memory.step import optimizer_step
from leanbert.models.config import EncoderConfig
from leanbert.optim.build import OptimizerConfig, build_optimizer
from leanbert.pretrained.build import build_model, rebuild
from leanbert.pretrained.huggingface.convert import read_huggingface, write_huggingface
from tests.pretrained.pairs import packed_batch, tiny_seq2seq
from tests.tiny import PlainTask, tiny_model, unequal_batch, whole_rows

PRESETS = ["bert", "modern"]
HEADS, SIZE, NEURONS = 4, 8, 48
KEPT_HEADS = [[0, 3], [1, 2]]  # of each block
KEPT_NEURONS = [list(range(0, 48, 2)), list(range(10, 34))]


def model_of(preset, dtype=torch.float64):
    return tiny_model(dtype=dtype, preset=preset, num_heads=HEADS, intermediate_size=NEURONS).eval()


def chosen():
    """The importance that keeps `KEPT_HEADS` and `KEPT_NEURONS`."""
    heads, neurons = torch.zeros(2, HEADS), torch.zeros(2, NEURONS)
    for layer in range(2):
        heads[layer, KEPT_HEADS[layer]] = 1.0
        neurons[layer, KEPT_NEURONS[layer]] = 1.0
    return Importance(heads, neurons)


def silence(model):
    """Set to zero what the heads and neurons that are not kept add."""
    importance = chosen()
    with torch.no_grad():
        for layer, block in enumerate(model.encoder.blocks):
            columns = importance.heads[layer].repeat_interleave(SIZE)
            block.attention.output.weight.mul_(columns)
            block.feed_forward.output.weight.mul_(importance.neurons[layer])


def logits(model):
    batch = unequal_batch()
    with torch.no_grad():
        return model(batch.inputs)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("by", ["choice", "weight"])
def test_removing_what_adds_nothing_changes_nothing(preset, by):
    model = model_of(preset)
    silence(model)
    before = logits(model)
    prune_structured(model, 2, 24, chosen() if by == "choice" else None)
    config = model.config
    assert (config.num_heads, config.head_size, config.intermediate_size) == (2, SIZE, 24)
    assert model.encoder.config is config
    assert (logits(model) - before).abs().max() <= 1e-12
    assert before.std() > 0.01


@pytest.mark.parametrize("preset", PRESETS)
def test_a_pruned_model_is_one_that_was_built_small(preset):
    model = model_of(preset)
    expected = silence_reference(model)
    prune_structured(model, 2, 24, chosen())
    config = model.config
    torch.set_default_dtype(torch.float64)
    try:
        small = build_model(config, 100).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    assert small.config == config
    small.load_state_dict(model.state_dict())
    assert (logits(small) - expected).abs().max() <= 1e-12
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all((layer.out_features, layer.in_features) == tuple(layer.weight.shape) for layer in layers)


def silence_reference(model):
    reference = copy.deepcopy(model)
    silence(reference)
    return logits(reference)


def test_head_importance_is_the_norm_of_value_times_output():
    model = model_of("bert")
    found = head_importance(model)
    for layer, block in enumerate(model.encoder.blocks):
        value = block.attention.qkv.weight[2 * 32 :]
        for head in range(HEADS):
            rows = slice(head * SIZE, (head + 1) * SIZE)
            product = block.attention.output.weight[:, rows] @ value[rows]
            assert found[layer, head].item() == pytest.approx(product.norm().item(), rel=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_neuron_importance_is_the_product_of_norms(preset):
    model = model_of(preset)
    feed_forward = model.encoder.blocks[1].feed_forward
    rows = feed_forward.input.weight
    if preset == "bert":
        inward = (rows[5].square().sum() + feed_forward.input.bias[5] ** 2).sqrt()
    else:
        inward = rows[5].norm() * rows[NEURONS + 5].norm()
    expected = inward * feed_forward.output.weight[:, 5].norm()
    assert neuron_importance(model)[1, 5].item() == pytest.approx(expected.item(), rel=1e-5)


def test_taylor_importance_is_the_derivative_by_a_gate():
    """The loss with an output scaled by 1 + e changes by e times the importance."""
    model, batch = model_of("modern"), unequal_batch()
    task = PlainTask(model)
    task.loss_sum(batch).backward()
    found = taylor_importance(model)

    def derivative(layer, columns):
        losses = []
        for scale in (1.01, 0.99):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                changed.get_submodule(layer).weight[:, columns] *= scale
            losses.append(PlainTask(changed).loss_sum(batch).item())
        return abs(losses[0] - losses[1]) / 0.02

    gate = derivative("encoder.blocks.1.attention.output", slice(SIZE, 2 * SIZE))
    assert found.heads[1, 1].item() == pytest.approx(gate, rel=1e-3)
    gate = derivative("encoder.blocks.0.feed_forward.output", slice(7, 8))
    assert found.neurons[0, 7].item() == pytest.approx(gate, rel=1e-3)
    model.zero_grad()
    with pytest.raises(UserError, match=r"^StructuredPruning\.importance: "):
        taylor_importance(model)


@pytest.mark.parametrize("preset", PRESETS)
def test_half_of_base_has_the_parameters_and_flops_of_arithmetic(preset):
    with FakeTensorMode():
        model = build_model(EncoderConfig(preset=preset, num_layers=12, hidden_size=768, num_heads=12), 30_522).eval()
        ids = torch.zeros(2, 128, dtype=torch.int64)
        inner, bias, matrices = model.config.intermediate_size, model.config.bias, 3 if model.config.gated else 2
        before, flops = model.num_parameters, count_flops(model, ids)
        prune_structured(model, *sizes_kept(model.config, 0.5, 0.5))
        fewer = flops - count_flops(model, ids)
    heads = 6 * 64 * (4 * 768 + 3 * bias)
    neurons = inner // 2 * (matrices * 768 + (matrices - 1) * bias)
    assert before - model.num_parameters == 12 * (heads + neurons)
    assert model.num_parameters == {"bert": 67_014_714, "modern": 66_548_538}[preset]
    products = 2 * 2 * 128 * (6 * 64 * 4 * 768 + inner // 2 * matrices * 768)  # 2 x tokens x weights
    scores = 2 * 2 * 2 * 6 * 128 * 128 * 64  # two products, rows, heads
    assert fewer == 12 * (products + scores)


def count_flops(model, ids):
    # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(whole_rows(ids))
    return counter.get_total_flops()


def test_training_keeps_less_for_the_backward_pass():
    model, batch = model_of("modern", torch.float32), unequal_batch()
    before = saved_bytes(model, batch)
    prune_structured(model, *sizes_kept(model.config, 0.5, 0.5))
    tokens, removed = batch.inputs.input_ids.numel(), before - saved_bytes(model, batch)
    # of each neuron that left: both halves, the activated half and the product, of each block
    assert removed >= 2 * tokens * 24 * 4 * 4


def saved_bytes(model, batch):
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = PlainTask(model).loss_sum(batch)
    loss.backward()
    return sum(saved.values())


@pytest.mark.parametrize("name", ["momentum", "adamw", "adafactor", "muon"])
def test_optimizer_state_is_cut_along(name, caplog):
    model, batch = model_of("bert", torch.float32), unequal_batch()
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1e-2))
    for _ in range(2):
        optimizer_step(PlainTask(model), batch, optimizer)
    parameters = dict(model.named_parameters())
    before = {name: copy.deepcopy(optimizer.state[parameter]) for name, parameter in parameters.items()}
    with caplog.at_level(logging.WARNING):
        prune_structured(model, 2, 24, chosen(), optimizer)
    assert not caplog.text
    kept = torch.tensor(KEPT_NEURONS[0])
    for layer, dim in (("input", 0), ("output", 1)):
        weight = f"encoder.blocks.0.feed_forward.{layer}.weight"
        assert model.get_parameter(weight) is parameters[weight]
        for key, value in optimizer.state[parameters[weight]].items():
            old = before[weight][key]
            cut = isinstance(old, torch.Tensor) and old.ndim == 2 and old.shape[dim] > 1
            assert torch.equal(value, old.index_select(dim, kept) if cut else torch.as_tensor(old))
    rows = torch.arange(96).view(3, HEADS, SIZE)[:, KEPT_HEADS[0]].flatten()
    bias = "encoder.blocks.0.attention.qkv.bias"
    for key, value in optimizer.state[parameters[bias]].items():
        assert value.numel() == 1 or torch.equal(value, before[bias][key][rows])
    assert all(group["params"] for group in optimizer.param_groups)
    loss = optimizer_step(PlainTask(model), batch, optimizer)
    assert loss.isfinite()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_pruned_run_resumes_into_a_model_that_is_shrunk_before_loading(name):
    batch, config = unequal_batch(), OptimizerConfig(name=name, lr=1e-2)
    model = model_of("modern", torch.float32)
    optimizer = build_optimizer(model, config)
    optimizer_step(PlainTask(model), batch, optimizer)
    prune_structured(model, 3, 20, optimizer=optimizer)
    optimizer_step(PlainTask(model), batch, optimizer)
    stored = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer_step(PlainTask(model), batch, optimizer)

    other = model_of("modern", torch.float32)
    prune_structured(other, 3, 20)
    other.load_state_dict(stored[0])
    resumed = build_optimizer(other, config)
    resumed.load_state_dict(stored[1])
    optimizer_step(PlainTask(other), batch, resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_state_that_does_not_line_up_starts_afresh_and_says_so(caplog):
    model, batch = model_of("bert", torch.float32), unequal_batch()
    optimizer = build_optimizer(model, OptimizerConfig(name="adamw"))
    optimizer_step(PlainTask(model), batch, optimizer)
    weight = model.encoder.blocks[1].feed_forward.output.weight
    optimizer.state[weight]["exp_avg"] = torch.zeros(weight.shape, dtype=torch.uint8)
    with caplog.at_level(logging.WARNING):
        prune_structured(model, 2, 24, chosen(), optimizer)
    assert "state of 1 pruned parameters" in caplog.text
    assert optimizer.state[weight] == {}
    optimizer_step(PlainTask(model), batch, optimizer)
    assert optimizer.state[weight]["exp_avg"].shape == (32, 24)


def test_hooks_stay_on_their_parameters():
    model, batch, seen = model_of("modern", torch.float32), unequal_batch(), []
    weight = model.encoder.blocks[0].attention.qkv.weight
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(tuple(parameter.grad.shape)))
    PlainTask(model).loss_sum(batch).backward()
    prune_structured(model, 2, 24)
    PlainTask(model).loss_sum(batch).backward()
    assert seen == [(96, 32), (48, 32)]


def test_all_that_stays_is_left_as_it_is():
    model = model_of("bert")
    before, config = model.state_dict(), model.config
    prune_structured(model, HEADS, NEURONS)
    assert model.config == config
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_shares_become_sizes():
    config = model_of("bert").config
    assert sizes_kept(config, 0.5, 0.25) == (2, 36)
    assert sizes_kept(config, 0.0, 0.99) == (4, 1)
    assert sizes_kept(config, 0.9, 0.0) == (1, 48)
    with pytest.raises(UserError, match=r"^0\.1 of 4 heads and 0\.01 of 48 neurons"):
        sizes_kept(config, 0.1, 0.01)


@pytest.mark.parametrize(("heads", "neurons", "setting"), [(5, 48, "heads_kept"), (4, 0, "neurons_kept")])
def test_sizes_that_cannot_stay_are_refused(heads, neurons, setting):
    with pytest.raises(UserError, match=rf"^{setting}: "):
        prune_structured(model_of("bert"), heads, neurons)


SEQ2SEQ = [
    {"preset": "bert"},
    {"preset": "modern"},
    {"preset": "bert", "start": "shared", "layers": 3},
    {"preset": "modern", "copy": True, "layers": 1},
    {"preset": "bert", "targets": 70},
]
MATRICES = {"attention": ("qkv", "output"), "cross_attention": ("query", "key_value", "output")}


def seq2seq_of(settings):
    return tiny_seq2seq(num_heads=HEADS, intermediate_size=NEURONS, **settings).eval()


def seq2seq_logits(model, batch):
    with torch.no_grad():
        return model(batch.inputs, batch.decoder_inputs)


@pytest.mark.parametrize("settings", SEQ2SEQ, ids=str)
def test_encoder_decoder_and_cross_attention_shrink_alike(settings):
    """Silent heads and neurons leave without a trace, and what stays is a model that was built small."""
    model, batch = seq2seq_of(settings), packed_batch(targets=settings.get("targets"))
    with torch.no_grad():
        for block in model.blocks:
            for name in MATRICES:
                if (attention := getattr(block, name, None)) is not None:
                    attention.output.weight[:, SIZE : 3 * SIZE] = 0.0
            block.feed_forward.output.weight[:, 5:29] = 0.0
    before = seq2seq_logits(model, batch)
    prune_structured(model, *sizes_kept(model.config, 0.5, 0.5))
    config = model.config
    assert (config.num_heads, config.head_size, config.intermediate_size) == (2, SIZE, 24)
    assert model.config is model.encoder.config is model.decoder.config
    assert (seq2seq_logits(model, batch) - before).abs().max() <= 1e-12
    assert before.std() > 0.01
    for block in model.blocks:
        assert block.feed_forward.output.weight.shape == (32, 24)
        for name, (*inner, output) in MATRICES.items():
            if (attention := getattr(block, name, None)) is not None:
                assert getattr(attention, output).weight.shape == (32, 2 * SIZE)
                assert sum(getattr(attention, part).weight.shape[0] for part in inner) == 3 * 2 * SIZE
    changes = {key: value for key, value in vars(config).items() if key != "vocab_size"}
    small = tiny_seq2seq(**changes | {key: value for key, value in settings.items() if key != "preset"}).eval()
    small.load_state_dict(model.state_dict())
    assert torch.equal(seq2seq_logits(small, batch), seq2seq_logits(model, batch))


def test_taylor_importance_has_a_row_for_each_attention():
    model, batch = seq2seq_of({"preset": "bert"}), packed_batch()
    model.loss_sum(batch.inputs, batch.decoder_inputs, batch.targets).backward()
    found = taylor_importance(model)
    assert found.heads.shape == (6, HEADS)  # of two blocks each: encoder, decoder, decoder to encoder
    assert found.neurons.shape == (4, NEURONS)
    cross = model.decoder.blocks[1].cross_attention.output
    expected = (cross.weight * cross.weight.grad)[:, SIZE : 2 * SIZE].sum().abs().item()
    assert found.heads[5, 1].item() == pytest.approx(expected, rel=1e-5)


def test_a_pruned_translation_model_leaves_with_equal_logits(tmp_path):
    model, batch = seq2seq_of({"preset": "bert"}), packed_batch()
    prune_structured(model, *sizes_kept(model.config, 0.5, 0.5))
    write_huggingface(model, tmp_path)
    again = rebuild(read_huggingface(tmp_path), 100).eval()
    assert (again.config.num_heads, again.config.intermediate_size) == (HEADS, 24)
    difference = seq2seq_logits(again.double(), batch) - seq2seq_logits(model, batch)
    assert difference.abs().max() <= 1e-5
