import torch

from leanbert.measure.timeline import Event, Storage, Timeline, layer_of, layer_rows


def storage(category, size, module="", phase="forward"):
    return Storage(category, module, phase, (size // 4,), torch.float32, size)


def made(operation, phase, item):
    return Event(operation, phase, item, item.size_bytes)


def freed(operation, phase, item):
    return Event(operation, phase, item, -item.size_bytes)


def example():
    weight, kept, passing, gradient = (
        storage("parameters", 400), storage("activations", 100, "encoder.blocks.0.attention.qkv"),
        storage("activations", 40, "head"), storage("gradients", 400, "head"),
    )  # fmt: skip
    start = [made(0, "forward", weight)]
    events = [
        Event(0, "forward", None, 0),
        made(1, "forward", kept),
        made(2, "forward", passing),
        freed(2, "forward", passing),
        Event(2, "backward", None, 0),
        made(3, "backward", gradient),
        freed(3, "backward", kept),
        Event(3, "optimizer", None, 0),
        freed(4, "optimizer", gradient),
    ]
    return Timeline(start, events)


def test_peaks_by_phase_and_category():
    timeline = example()
    assert timeline.totals.tolist() == [400, 500, 540, 500, 500, 900, 800, 800, 400]
    assert timeline.peak_bytes == 900
    assert timeline.by_phase == {"forward": 540, "backward": 900, "optimizer": 800}  # on entry to the update
    assert timeline.by_category == {
        "parameters": 400, "optimizer": 0, "gradients": 400, "activations": 100, "other": 0,
    }  # fmt: skip
    assert timeline.spans == [("forward", 0, 2), ("backward", 2, 3), ("optimizer", 3, 4)]
    assert [item.size_bytes for item in timeline.saved] == [100]


def test_the_state_that_the_first_step_makes_is_there_before_the_second():
    state, passing, old = storage("optimizer", 80), storage("optimizer", 8), storage("optimizer", 4)
    start = [made(0, "forward", storage("parameters", 40)), made(0, "forward", old)]
    events = [
        Event(0, "forward", None, 0),
        made(1, "forward", storage("activations", 100)),
        Event(1, "optimizer", None, 0),
        made(2, "optimizer", state),
        made(3, "optimizer", passing),
        freed(4, "optimizer", passing),
    ]
    second = Timeline(start, events).with_state_before()
    assert second.totals.tolist() == [124, 224, 224, 232, 224]
    assert second.categories_by_phase["forward"]["optimizer"] == 84
    assert second.with_state_before().totals.tolist() == second.totals.tolist()


def test_names_of_layers():
    assert layer_of("encoder.blocks.3.attention.qkv") == ("encoder.blocks.3", "attention")
    assert layer_of("encoder.blocks.11") == ("encoder.blocks.11", "itself")
    assert layer_of("encoder.embeddings.token") == ("encoder.embeddings", "token")
    assert layer_of("encoder.final_norm") == ("encoder.final_norm", "itself")
    assert layer_of("encoder") == ("encoder", "itself")
    assert layer_of("head.dense") == ("head", "dense")
    assert layer_of("head") == ("head", "itself")
    assert layer_of("") == ("outside the model", "itself")


def test_the_table_of_layers():
    mib = 2**20
    saved = [
        storage("activations", 3 * mib, "encoder.blocks.0.attention.qkv"),
        storage("activations", mib // 2, "encoder.blocks.0.feed_forward"),
        storage("activations", mib // 2, "head.dense"),
    ]
    assert layer_rows(saved) == [
        ("encoder.blocks.0", "3.50", "87.5%", "attention 3.00, feed_forward 0.50"),
        ("head", "0.50", "12.5%", "dense 0.50"),
        ("total", "4.00", "", ""),
    ]
