import pytest

from leanbert.errors import UserError
from leanbert.planning.device import Target
from leanbert.planning.overlays import apply, read
from leanbert.planning.predict import predict
from leanbert.planning.sweep import parse_sweep, sweep, with_size
from tests.planning.test_predict import settings

GPU = Target("cuda", 1000, slack=0.1, slack_returned=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("technique", [(), ("layer_major",)])
def test_one_sequence_more_would_not_fit(technique):
    run = settings(*technique)
    cells = sweep(run, GPU, 6_000_000, ["given"], [16, 64])
    assert [cell.max_length for cell in cells] == [16, 64]
    assert cells[0].micro_batch > cells[1].micro_batch > 1
    cell = cells[1]
    for rows, fits in ((cell.micro_batch, True), (cell.micro_batch + 1, False)):
        direct = settings(*technique, length=64, rows=2 * rows)
        direct.data.hparams["val_batch_size"] = rows
        direct = apply(direct, read("layer_major" if technique else "accumulation", rows))
        assert (1000 + round(1.1 * predict(direct).peak_bytes) <= 6_000_000) == fits


def test_a_single_sequence_may_not_fit():
    (cell,) = sweep(settings(), GPU, 100_000, ["given"], [32])
    assert cell.micro_batch == 0
    assert cell.needs_bytes > 100_000


def test_sizes_are_those_of_the_shipped_configs():
    base = with_size(settings(), "base").task.encoder_config
    assert (base.num_layers, base.hidden_size, base.num_heads) == (12, 768, 12)
    assert with_size(settings(), "given").task.encoder_config.num_layers == 9


def test_axes():
    run = settings(length=48)
    assert parse_sweep(["size=mini,base", "max_length=8,16"], run) == (["mini", "base"], [8, 16])
    assert parse_sweep([], run) == (["given"], [48])
    for word in ("size=", "depth=3", "size=huge", "max_length=x", "max_length=4"):
        with pytest.raises(UserError, match="sweep: "):
            parse_sweep([word], run)
