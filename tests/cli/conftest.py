"""A corpus and a run that tests of several subcommands share."""

import pytest

from tests.cli.program import run
from tests.corpus import write_corpus
from tests.training import TINY


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "train.txt")
    return folder


@pytest.fixture(scope="module")
def trained(corpus):
    """A finished run of 30 steps, validated every 10, and what it printed."""
    result = run(
        corpus, "fit", *TINY, "--data.train_files=train.txt", "--trainer.max_steps=30",
        "--trainer.val_check_interval=10", "--checkpoint.every_n_steps=7",
    )  # fmt: skip
    return corpus / "runs" / "mlm" / "version_0", result
