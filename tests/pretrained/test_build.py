import numpy as np
import pytest
import torch
from torch import nn

from leanbert.errors import UserError
from leanbert.measure.trace import LiveBytes
from leanbert.models.config import EncoderConfig
from leanbert.models.stored import ModelMetadata, Stored
from leanbert.pretrained.build import build_model, load_weights, read_model, rebuild
from leanbert.pretrained.huggingface.convert import write_huggingface
from tests.tiny import whole_rows

SIZES = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 64}


def save_checkpoint(path, model, **changes):
    encoder = vars(model.config) | changes
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state | {"metric.total": torch.ones(1)}, "leanbert": {"encoder": encoder}}, path)
    return path


def test_parameters_of_bert_base_are_the_published_number():
    with torch.device("meta"):
        config = EncoderConfig(preset="bert", num_layers=12, hidden_size=768, num_heads=12)
        model = build_model(config, 30_522)
    assert model.num_parameters == 109_514_298


@pytest.mark.parametrize("preset", ["bert", "modern"])
def test_fewer_heads_have_fewer_parameters(preset):
    config = EncoderConfig(**SIZES | {"num_heads": 3}, preset=preset, head_size=8)
    model = build_model(config, 99)
    full = build_model(EncoderConfig(**SIZES, preset=preset), 99)
    head = 8 * (4 * 32 + (3 if preset == "bert" else 0))  # rows of q, k, v (and their biases), output columns
    assert full.num_parameters - model.num_parameters == 2 * head
    assert model(whole_rows(torch.randint(99, (2, 8)))).shape == (2, 8, 99)


def test_parameters_of_the_modern_mini():
    # Per block: 3 d^2 + d^2 + 3 d i and two norms (one in block 0); embedding and final norm; head d^2, norm, bias.
    model = build_model(EncoderConfig(), 8_200)
    block = 4 * 256**2 + 3 * 256 * 682
    norms = (2 * 4 - 1 + 2) * 256
    assert model.num_parameters == 8_200 * 256 + 4 * block + norms + 256**2 + 256 + 8_200


def test_modern_blocks_begin_as_the_identity():
    model = build_model(EncoderConfig(**SIZES), 99).eval()
    inputs = whole_rows(torch.randint(99, (2, 8)))
    embedded = model.encoder.embeddings(inputs)
    assert torch.equal(model.encode(inputs), model.encoder.final_norm(embedded))
    assert model.encoder.embeddings.token.weight[:99].std().item() == pytest.approx(0.02, rel=0.05)


def test_bert_draws_all_weights_but_positions_with_the_same_spread():
    model = build_model(EncoderConfig(**SIZES, preset="bert"), 990)
    size = model.config.head_size
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and "norm" not in name and parameter.numel() >= 1000:
            drawn = parameter[:990] if "token" in name else parameter
            if "embeddings.token" in name or "embeddings.position" in name:
                drawn = drawn[:, size:]  # the first dimensions are for positions
            if name.endswith("blocks.0.attention.qkv.weight"):
                drawn = drawn[2 * drawn.shape[0] // 3 :]  # values
            assert drawn.std().item() == pytest.approx(0.02, rel=0.1), name
        elif "norm" in name:
            assert parameter.unique().tolist() == [1.0 if name.endswith("weight") else 0.0]


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def default_dtype(request):
    """The dtype in which a model is built, as with bf16-true."""
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("length", [16, 512])
def test_first_heads_of_bert_begin_by_looking_at_neighbours(length, default_dtype):
    torch.manual_seed(0)
    model = build_model(EncoderConfig(preset="bert", num_layers=1), 500).eval()
    hidden = model.encoder.embeddings(whole_rows(torch.randint(500, (1, length))))
    attention = model.encoder.blocks[0].attention
    query, key, _ = attention.qkv(hidden).view(length, 3, 4, 64).permute(1, 2, 0, 3)  # [4, S, d] each
    probability = (query.float() @ key.float().mT / 8).softmax(-1)
    for head, offset in enumerate((-1, 1, -2, 2)):
        assert probability[head].diagonal(offset).min() > 0.99
    with torch.no_grad():
        for block in build_model(EncoderConfig(preset="bert", position="rotary"), 500).encoder.blocks:
            assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
def test_positions_of_a_model_built_in_bfloat16_are_those_of_float32_rounded(position, default_dtype):
    torch.manual_seed(0)
    embeddings = build_model(EncoderConfig(preset="bert", num_layers=1, position=position), 500).encoder.embeddings
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    exact = build_model(EncoderConfig(preset="bert", num_layers=1, position=position), 500).encoder.embeddings
    if position == "learned":
        assert torch.equal(embeddings.position.weight[:, :64], exact.position.weight[:, :64].to(embeddings.norm.weight))
    elif position == "sinusoidal":
        assert torch.equal(embeddings.fixed_position, exact.fixed_position.to(embeddings.norm.weight))
    assert embeddings(whole_rows(torch.arange(500)[None])).dtype == embeddings.norm.weight.dtype


def test_seed_decides_the_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build_model(EncoderConfig(**SIZES), 99).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_head_begins_at_the_unigram_frequencies():
    counts = np.arange(99)
    model = build_model(EncoderConfig(**SIZES), 99, unigram_counts=counts)
    expected = (counts + 1) / (counts + 1).sum()
    assert np.allclose(model.head.bias[:99].detach().exp().numpy(), expected, rtol=1e-5)
    assert model.head.bias[99:].abs().max() == 0
    with pytest.raises(ValueError, match="100"):
        build_model(EncoderConfig(**SIZES), 99, unigram_counts=np.arange(100))


def test_checkpoint_brings_architecture_and_weights(tmp_path):
    source = build_model(EncoderConfig(**SIZES, preset="bert"), 99)
    path = save_checkpoint(tmp_path / "a.ckpt", source)
    counts = np.ones(99, dtype=np.int64)
    model = build_model(EncoderConfig(), 99, init_from=path, unigram_counts=counts)
    assert model.config == source.config
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_what_a_model_is_made_of_is_read_without_its_weights(tmp_path):
    model = build_model(EncoderConfig(**SIZES, preset="bert"), 99)
    path = save_checkpoint(tmp_path / "a.ckpt", model)
    (tmp_path / "folder").mkdir()
    write_huggingface(model, tmp_path / "folder")
    content, record = path.read_bytes(), model.state_dict()["encoder.blocks.0.attention.qkv.weight"].numpy().tobytes()
    assert content.count(record) == 1
    path.write_bytes(content.replace(record, bytes(len(record))))
    (tmp_path / "folder" / "model.safetensors").unlink()
    for source, message in ((path, "damaged"), (tmp_path / "folder", r"no model\.safetensors")):
        stored = read_model(source)
        assert (stored.config, stored.metadata.task) == (model.config, "mlm")
        with pytest.raises(UserError, match=rf"^{source}: {message}"):
            stored.read_weights()


def test_dropout_of_the_user_wins_over_the_checkpoint(tmp_path):
    path = save_checkpoint(tmp_path / "a.ckpt", build_model(EncoderConfig(**SIZES, preset="bert"), 99))
    model = build_model(EncoderConfig(dropout=0.3, num_layers=7), 99, init_from=path)
    assert (model.config.dropout, model.config.attention_dropout) == (0.3, 0.1)
    assert model.encoder.blocks[1].dropout == 0.3
    assert len(model.encoder.blocks) == 2


def test_another_vocabulary_is_refused(tmp_path):
    path = save_checkpoint(tmp_path / "a.ckpt", build_model(EncoderConfig(**SIZES), 99))
    with pytest.raises(UserError, match=r"a\.ckpt: the model knows 99 tokens, the tokenizer has 100\. [^\n]*$"):
        build_model(EncoderConfig(), 100, init_from=path)


def test_checkpoint_of_another_shape_is_refused(tmp_path):
    model = build_model(EncoderConfig(**SIZES), 99)
    path = save_checkpoint(tmp_path / "a.ckpt", model, intermediate_size=100)
    with pytest.raises(UserError, match=r"feed_forward\.input\.weight has shape \[168, 32\], .* \[200, 32\]"):
        build_model(EncoderConfig(), 99, init_from=path)


def test_weights_of_a_folder_are_made_one_at_a_time(tmp_path):
    model = build_model(EncoderConfig(**SIZES, preset="bert"), 99)  # 128 rows, of which the file has 99
    write_huggingface(model, tmp_path)
    with LiveBytes(nn.Module()) as trace:
        state = read_model(tmp_path).read_weights()
        largest = max(state[name].nbytes for name in state)
    totals = trace.timeline().totals
    assert totals.max() - totals[-1] == largest == 128 * 32 * 4  # what is mapped stays
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_missing_and_unexpected_weights_are_named():
    model = build_model(EncoderConfig(**SIZES), 99)
    state = model.state_dict()
    lost = {name: tensor for name, tensor in state.items() if name != "head.bias"}
    with pytest.raises(UserError, match=r"^x: the weights lack head\.bias"):
        load_weights(model, lost, "x")
    with pytest.raises(UserError, match=r"^x: the weights have unexpected pooler"):
        load_weights(model, state | {"pooler": torch.ones(1)}, "x")


def test_checkpoints_of_unknown_tasks_or_without_labels_are_refused(tmp_path):
    config = EncoderConfig(**SIZES, vocab_size=99).resolved()
    reasons = {"parsing": "task 'parsing', which is unknown", "tagging": "task tagging without its labels"}
    for task, message in reasons.items():
        with pytest.raises(UserError, match=f"^a model of {message}"):
            rebuild(Stored(config, ModelMetadata(task), tmp_path, dict), 99)
