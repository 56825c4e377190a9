"""A configuration and a checkpoint that older code (41b11f6) has written still go on, answer and leave.

`older/` holds what four steps wrote, with `configs/memory/accumulation.yaml`; the values are those of the older code.
"""

import json
import shutil
from pathlib import Path

import pytest

from leanbert.cli.app import CLI, quiet_libraries
from tests.corpus import write_corpus
from tests.training import scalars

OLDER = Path(__file__).parent / "older"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    quiet_libraries()
    shutil.copytree(OLDER, tmp_path, dirs_exist_ok=True)
    write_corpus(tmp_path / "train.txt", documents=200)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(subcommand, *options):
    return CLI([subcommand, "--config=config.yaml", "--ckpt_path=step-00000004.ckpt", *options])


def test_training_goes_on(folder):
    values = scalars(run("fit", "--trainer.max_steps=6", "--trainer.log_every_n_steps=1"))
    assert values["train/loss"] == pytest.approx({5: 3.4350929, 6: 3.6164103}, rel=1e-5)
    assert values["val/loss"][6] == pytest.approx(3.4952641, rel=1e-5)


def test_it_answers(folder, capsys):
    (folder / "texts.txt").write_text("The [MASK] of the house.\n")
    run("predict", "--data.predict_files=texts.txt")
    answer = json.loads(capsys.readouterr().out)
    found = {entry["token"]: entry["probability"] for entry in answer["masks"][0]}
    assert found == pytest.approx(
        {"the": 0.210682, "was": 0.064619, ".": 0.059619, ",": 0.05802, "and": 0.05782}, abs=2e-6
    )


def test_it_leaves_as_a_hugging_face_folder(folder):
    run("export", "--output=out")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in Path("out").iterdir()}
