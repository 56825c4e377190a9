import pytest

from leanbert.callbacks.techniques.activations import (
    ActivationCheckpointing,
    ActivationOffload,
    ChunkedHead,
    LayerMajor,
)
from leanbert.errors import UserError


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: ActivationCheckpointing(every=0), "ActivationCheckpointing.every: 0"),
        (lambda: LayerMajor(micro_batch=0), "LayerMajor.micro_batch: 0"),
        (lambda: ChunkedHead(targets=-1), "ChunkedHead.targets: -1"),
    ],
)
def test_numbers_are_positive(make, setting):
    with pytest.raises(UserError, match=setting):
        make()


def test_a_folder_belongs_to_the_disk():
    with pytest.raises(UserError, match="no effect with to=host"):
        ActivationOffload(to="host", folder="x")
