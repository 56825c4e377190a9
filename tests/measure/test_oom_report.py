import pytest
import torch
from torch import nn

from leanbert.measure.oom_report import find_live, makers_by_size, oom_report
from leanbert.measure.timeline import Storage
from leanbert.measure.trace import LiveBytes
from leanbert.tasks.techniques import advice
from tests.tiny import PlainTask, tiny_model, unequal_batch

ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")


def storage(category, mib, module="", shape=(1,)):
    return Storage(category, module, "forward", shape, torch.bfloat16, mib * 2**20)


def activation_bytes(live):
    return sum(item.size_bytes for item in live if item.category == "activations")


def test_the_report_ranks_and_advises():
    live = [
        storage("activations", 600, "encoder.blocks.3.feed_forward.input", (32, 128, 2048)),
        storage("activations", 100, "encoder.blocks.3.attention", (32, 128, 768)),
        storage("parameters", 200, "encoder.embeddings.token.weight"),
        storage("optimizer", 400, "exp_avg of head.bias"),
    ]
    lines = oom_report(ERROR, live, "in step 7", advice()).split("\n")
    assert lines[0] == "Out of memory in step 7: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert "Live tensors      1,300.0 MiB" in lines
    assert "  activations       700.0    53.8%" in lines
    largest = lines[lines.index("The 4 largest") + 1]
    text = "600.0 activations bfloat16 (32, 128, 2048) encoder.blocks.3.feed_forward.input"
    assert " ".join(largest.split()) == text
    assert lines[lines.index("Activations by layer") + 1].split() == ["700.0", "encoder.blocks.3"]
    activations, optimizer = lines[lines.index("What would help most") + 1 :]  # parameters are less than half of these
    assert activations.startswith("  activations: --config configs/memory/accumulation.yaml lowers activations, to")
    assert "or --config configs/memory/checkpointing.yaml lowers" in activations
    assert optimizer.startswith("  optimizer: --config configs/memory/adamw_8bit.yaml lowers optimizer state, to")


def test_when_the_model_itself_does_not_fit_a_smaller_one_is_advised():
    for live in ([], [storage("other", 10)]):
        *_, last = oom_report(ERROR, live, "while the model was being built", advice()).split("\n")
        assert last.startswith("  parameters: --config configs/memory/bf16_true.yaml")


def test_live_tensors_are_found_without_a_trace():
    model = tiny_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    task = PlainTask(model)
    with LiveBytes(model) as trace:
        task.loss_sum(unequal_batch()).backward()
    makers = makers_by_size(trace.timeline().saved)
    optimizer.step()
    before = activation_bytes(find_live(model, [optimizer], "cpu"))  # of other tests, maybe
    loss = task.loss_sum(unequal_batch(rows=8))  # its activations are held by autograd alone
    live = find_live(model, [optimizer], "cpu", makers)
    sizes = {}
    for item in live:
        sizes[item.category] = sizes.get(item.category, 0) + item.size_bytes
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert sizes["parameters"] == sizes["gradients"] == parameters
    assert sizes["optimizer"] == sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    wide = [item for item in live if item.shape == (8 * 16, 32) and item.category == "activations"]
    assert wide
    saved = sum(storage.size_bytes for storage in trace.timeline().saved)
    assert sizes["activations"] - before == pytest.approx(saved, rel=0.05)
    assert any(item.module == "encoder.blocks.0.attention.qkv or encoder.blocks.1.attention.qkv" for item in live), {
        item.module for item in live
    }
    loss.backward()
    assert activation_bytes(find_live(model, [optimizer], "cpu")) - before <= 16  # the loss itself


def test_finding_does_not_compute_checkpointed_blocks():
    runs = []

    class Counted(nn.Linear):
        def forward(self, x):
            runs.append(1)
            return super().forward(x)

    layer = Counted(4, 4)
    loss = torch.utils.checkpoint.checkpoint(layer, torch.ones(2, 4), use_reentrant=False).sum()
    assert find_live(layer, [], "cpu")
    assert runs == [1]
    loss.backward()
    assert runs == [1, 1]
