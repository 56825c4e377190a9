"""The page on extending, followed word for word."""

import re
import sys
from pathlib import Path

import pytest

from leanbert.cli.app import CLI, quiet_libraries
from leanbert.errors import UserError
from leanbert.planning.predict import predict
from tests.corpus import write_corpus
from tests.training import TINY

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def block(language, section):
    """Return the first block of a language in a section of the page."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    quiet_libraries()
    write_corpus(tmp_path / "train.txt")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


class Planned(CLI):
    """`plan`, which keeps the prediction."""

    def plan(self, options):
        self.prediction = predict(self.run_settings())


def test_a_technique(folder):
    (folder / "mine.py").write_text(block("python", "A memory technique"))
    (folder / "frozen.yaml").write_text(block("yaml", "A memory technique"))
    plain, frozen = ["--config=configs/mlm.yaml"], [f"--config={folder / 'frozen.yaml'}"]
    settings = [
        *TINY, "--model.encoder.preset=bert", f"--data.train_files={folder / 'train.txt'}", "--trainer.max_steps=2",
        f"--data.cache_dir={folder / 'cache'}", f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    with_all, without = (Planned(["plan", *plain, *more, *settings]).prediction for more in ((), frozen))
    model = CLI(["fit", *plain, *frozen, *settings]).model.model
    embeddings = model.encoder.embeddings
    weights = (embeddings.token.weight, embeddings.position.weight)
    assert not any(weight.requires_grad for weight in weights)
    assert all(weight.requires_grad for weight in model.encoder.blocks.parameters())
    assert with_all.gradient_bytes - without.gradient_bytes == pytest.approx(sum(w.nbytes for w in weights), rel=0.2)
    pruned = "--config=configs/memory/structured_pruning.yaml"
    with pytest.raises(UserError, match="FrozenEmbeddings: a pruned model has to learn again"):
        CLI(["fit", *plain, *frozen, pruned, *settings])
