"""What is installed beside LeanBERT costs its start nothing, and works in its process."""

import subprocess
import sys

from tests.corpus import write_corpus
from tests.training import TINY

OPTIONAL = ("scipy", "transformers", "pandas", "datasets", "sklearn", "matplotlib.pyplot")

ALL_IS_THERE = """
import torchmetrics
from torchmetrics.metric import Metric
from torchmetrics.functional.text.bert import AutoModel
assert AutoModel is not None and "transformers" in sys.modules and "scipy" in sys.modules
assert torchmetrics.Metric is Metric and issubclass(torchmetrics.SumMetric, Metric)
for name in torchmetrics.__all__:
    getattr(torchmetrics, name)
metric = torchmetrics.SumMetric()
metric.update(1.0)
assert metric.plot() and "matplotlib.pyplot" in sys.modules
from transformers import BertModel
"""

FIT = f"""
import importlib, sys
from leanbert.cli import main
main()
for task in ("classification", "seq2seq", "tagging"):
    importlib.import_module("leanbert.tasks." + task)
print([name for name in {OPTIONAL} if name in sys.modules])
{ALL_IS_THERE}
"""

ANOTHER_VERSION = """
import sys
from leanbert.cli import deferred
finders = list(sys.meta_path)
deferred.OWN = {"a_module_of_another_version": "Metric"}
deferred.install()
assert sys.meta_path == finders
assert not [name for name in sys.modules if name.startswith("torchmetrics")]
"""


def run(folder, program, *arguments):
    words = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_training_imports_no_optional_package_and_who_wants_torchmetrics_has_all_of_it(tmp_path):
    write_corpus(tmp_path / "train.txt")
    settings = ["--data.train_files=train.txt", "--trainer.max_steps=1"]
    assert run(tmp_path, FIT, "fit", "--config", "configs/mlm.yaml", *TINY, *settings) == "[]\n"


def test_a_version_that_is_made_otherwise_is_imported_as_usual(tmp_path):
    run(tmp_path, ANOTHER_VERSION)
