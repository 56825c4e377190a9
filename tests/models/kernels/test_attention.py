from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from leanbert.memory.checkpointing import set_checkpointing
from leanbert.models.kernels import attention
from leanbert.models.kernels.attention import (
    additive_mask,
    attend,
    make_mask,
    prefers_products,
    same_document,
    takes_documents,
)
from leanbert.models.packed_inputs import Documents, PackedInputs
from leanbert.planning.fake import Fake
from tests.tiny import PlainTask, tiny_model, unequal_batch


def test_mask_has_the_dtype_of_the_products():
    allowed = torch.tensor([[[[True, False]]]])
    with torch.autocast("cpu", torch.bfloat16):
        assert additive_mask(allowed, torch.empty(0)).dtype == torch.bfloat16
    mask = additive_mask(allowed, torch.empty(0, dtype=torch.float64))
    assert mask.dtype == torch.float64
    assert mask.flatten().tolist() == [0.0, float("-inf")]


def test_documents_of_queries_and_keys_are_compared():
    found = same_document(torch.tensor([[0, 1]]), torch.tensor([[0, 0, 1]]))
    assert found.tolist() == [[[[True, True, False], [False, False, True]]]]


@pytest.mark.parametrize("masked", [False, True])
def test_products_and_fused_kernel_agree_forward_and_backward(monkeypatch, masked):
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(3, 2, 4, 9, 8, generator=generator, dtype=torch.float64)
    ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    mask = additive_mask(same_document(ids, ids), parts) if masked else None
    results = []
    for products in (False, True):
        monkeypatch.setattr(attention, "prefers_products", lambda *_, chosen=products: chosen)
        leaf = parts.clone().requires_grad_()
        out = attend(*leaf, mask)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-12)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-12)


def test_dropout_of_probabilities_keeps_the_mean():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 6, 4)
    dropped = attend(*(part.expand(4000, -1, -1, -1) for part in (query, key, value)), None, 0.3)
    assert dropped.std(0).min() > 0.05
    mean = dropped.mean(0, keepdim=True)
    assert torch.allclose(mean, F.scaled_dot_product_attention(query, key, value), atol=0.05)


def test_kernel_choice():
    def chosen(queries, dtype, rate=0.0, device="cpu"):
        return prefers_products(torch.empty(1, 1, queries, 8, dtype=dtype, device=device), rate)

    assert [chosen(queries, torch.bfloat16) for queries in (15, 16, 512, 513)] == [False, True, True, False]
    assert not chosen(512, torch.float32)
    assert chosen(513, torch.float32, rate=0.1)
    assert not chosen(512, torch.bfloat16, device="meta")
    assert not chosen(512, torch.float32, rate=0.1, device="meta")


def reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """`torch.nn.attention.varlen.varlen_attn` by its documentation: one document after the other."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.shape == key.shape == value.shape == (int(cu_seq_q[-1]), *query.shape[1:])
    sizes = cu_seq_q.diff()
    assert sizes.min() > 0
    assert max_q == max_k >= sizes.max()
    mixed = []
    for first, last in pairwise(cu_seq_q.tolist()):
        q, k, v = (part[first:last].transpose(0, 1) for part in (query, key, value))  # [H, n, d]
        distance = torch.arange(last - first)[None, :] - torch.arange(last - first)[:, None]
        left, right = (bound if bound >= 0 else last - first for bound in window_size)
        scores = (q @ k.transpose(1, 2)) * (scale or q.shape[-1] ** -0.5)
        scores = scores.masked_fill((distance < -left) | (distance > right), float("-inf"))
        mixed.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(mixed)


IDS = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 2, 2, -1, -1], [0, 0, 0, -1, -1, -1]])


@pytest.mark.parametrize("window", [(-1, -1), (1, 1), (-1, 0), (2, 0)])
def test_attention_inside_documents_is_attention_with_a_mask(monkeypatch, window):
    monkeypatch.setattr(varlen, "varlen_attn", reference)
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(4, 6, 3, 2, 8, generator=generator, dtype=torch.float64)  # [B, S, 3, H, d], as it is projected
    inputs = PackedInputs.whole_rows(IDS)
    inputs = PackedInputs(inputs.input_ids, inputs.position_ids, IDS).delimited()
    results = []
    for chosen in (True, False):
        monkeypatch.setattr(attention, "takes_documents", lambda *_, chosen=chosen: chosen)
        mask = make_mask(inputs, fused, 8, 0.0, window)
        assert isinstance(mask, Documents) is chosen
        leaf = fused.clone().requires_grad_()
        out = attend(*leaf.transpose(1, 3).unbind(2), mask)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    for packed, dense in zip(*results, strict=True):
        torch.testing.assert_close(packed, dense, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("way", ["plain", "checkpointing", "layer_major"])
@pytest.mark.parametrize("window", [0, 6])
def test_a_model_has_the_same_gradients_without_masks(monkeypatch, window, way):
    """In micro-batches of three rows, of which the last has two, and in slices of those."""
    monkeypatch.setattr(varlen, "varlen_attn", reference)
    batch, found = unequal_batch().delimited(), []
    for chosen in (True, False):
        monkeypatch.setattr(attention, "takes_documents", lambda *_, chosen=chosen: chosen)
        model = tiny_model(local_window=window, global_every=2)
        if way == "checkpointing":
            set_checkpointing(model.encoder.blocks, "input")
        for block in model.encoder.blocks:
            block.slice_rows = 2 if way == "layer_major" else None
        for part in batch.split(3):
            PlainTask(model).loss_sum(part).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-9, atol=1e-11), name


def test_where_attention_needs_no_mask():
    """On CUDA in 16 bits, without dropout; a dry run knows for what its tensors stand."""

    def chosen(dtype=torch.bfloat16, size=64, rate=0.0, target="cuda"):
        with Fake(target):
            return takes_documents(torch.empty(1, dtype=dtype), size, rate)

    assert chosen()
    assert chosen(torch.float16, 256)
    assert not any((chosen(torch.float32), chosen(size=20), chosen(size=264), chosen(rate=0.1), chosen(target="cpu")))
    with Fake("cuda"), torch.autocast("cpu", torch.bfloat16):
        assert takes_documents(torch.empty(1), 64, 0.0)


def test_a_dry_run_for_cuda_calls_its_kernels():
    """Their results and what they save: of a mask no scores, with or without dropout."""

    def saved_bytes(dtype, documents, rate=0.0):
        inputs, saved = PackedInputs.whole_rows(torch.zeros(2, 32, dtype=torch.int64)), {}

        def keep(tensor):
            saved[id(tensor.untyped_storage())] = tensor.untyped_storage()
            return tensor

        with Fake("cuda"):
            fused = torch.empty(3, 2, 4, 32, 8, dtype=dtype, requires_grad=True)
            ids = torch.zeros(2, 32, dtype=torch.int64)
            inputs = PackedInputs(ids, ids, ids).delimited(Documents.whole_rows)
            mask = make_mask(inputs, fused, 8, rate)
            assert isinstance(mask, Documents) is documents
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                out = attend(*fused.unbind(0), mask, rate)
            out.sum().backward()
            assert (out.shape, fused.grad.shape) == ((2, 4, 32, 8), (3, 2, 4, 32, 8))
        mask_bytes = 0 if documents else 2 * 32 * 32 * dtype.itemsize
        return sum(storage.nbytes() for storage in saved.values()) - mask_bytes

    queries, statistics = 2 * 4 * 32 * 8, 2 * 4 * 32 * 4
    random = 2 * 8  # seed and offset
    packed = 3 * 4  # cu_seqlens
    assert saved_bytes(torch.bfloat16, documents=True) == 2 * 4 * queries + statistics + random + packed
    for rate in (0.0, 0.1):
        assert saved_bytes(torch.float32, documents=False, rate=rate) == 4 * 4 * queries + statistics + random


def test_compiled_blocks_have_the_kernel_in_one_graph(monkeypatch):
    """Traced, not run; other numbers of documents compile at most once more."""
    monkeypatch.setattr(attention, "takes_documents", lambda *_: True)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(str(graph.code))
        return lambda *args: (torch.zeros(4, 16, 32, dtype=torch.bfloat16),)

    model = tiny_model(torch.float32).to(torch.bfloat16)
    block = model.encoder.blocks[1]
    block.compile(backend=compiler, fullgraph=True)
    with torch.no_grad():
        for size in (8, 4, 3, 2):
            inputs = PackedInputs.whole_rows(torch.ones(4, 16, dtype=torch.int64))
            inputs.document_ids = inputs.position_ids // size
            inputs = inputs.delimited()
            hidden = torch.zeros(4, 16, 32, dtype=torch.bfloat16)
            block(hidden, model.encoder.make_context(inputs, hidden))
    assert len(graphs) <= 2
    assert all("varlen_attn" in graph for graph in graphs)
