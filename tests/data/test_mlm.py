from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from leanbert.data.batches.batch import MLMBatch, PredictBatch
from leanbert.data.mlm import MaskedLMData
from leanbert.errors import UserError
from tests.data.corpora import CHINESE, ENGLISH, MULTILINGUAL, sentences, write_corpus


def make_data(tmp_path: Path, **settings: Any) -> MaskedLMData:
    path = tmp_path / "corpus.txt"
    if not path.exists():
        write_corpus(path, sentences(ENGLISH, 300))
    defaults = {"train_files": str(path), "cache_dir": str(tmp_path / "cache"), "vocab_size": 300}
    defaults |= {"max_length": 32, "batch_size": 8, "val_share": 0.1, "num_workers": 0}
    return MaskedLMData(**(defaults | settings))


def ready(tmp_path: Path, **settings: Any) -> MaskedLMData:
    data = make_data(tmp_path, **settings)
    data.setup("fit")
    return data


def same(left: MLMBatch, right: MLMBatch) -> bool:
    return all(torch.equal(tensor, right.tensors()[name]) for name, tensor in left.tensors().items())


def test_sizes_and_statistics(tmp_path: Path) -> None:
    data = ready(tmp_path)
    train, val = data.statistics["train"], data.statistics["val"]
    assert train.documents + val.documents == 300
    assert 15 <= val.documents <= 45
    assert train.rows == -(-train.tokens // 32)
    assert train.tokens_per_row == train.tokens / train.rows
    assert train.tokens_per_row / 32 > 0.99
    assert train.unknown_fraction == data.unigram_counts[1] / data.unigram_counts[np.r_[1, 5:300]].sum() < 0.01
    assert data.unigram_counts.sum() == train.tokens
    loader = data.train_dataloader()
    assert len(loader) == len(list(loader)) == data.batches_per_epoch == train.rows // 8
    assert sum(map(len, data.val_dataloader())) == val.rows


def test_validation_texts_are_the_held_out_documents_as_they_were_written(tmp_path: Path) -> None:
    data = ready(tmp_path)
    texts = list(data.validation_texts())
    written = (tmp_path / "corpus.txt").read_text(encoding="utf-8").split("\n\n")
    assert texts == [text.strip("\n") for text in written if text.strip("\n") in texts]
    assert len(texts) == data.statistics["val"].documents
    ids = sum(len(ids) for ids in data.tokenizer.encode_batch(texts, literal=True))
    assert ids == data.statistics["val"].tokens


def test_at_least_99_percent_of_training_positions_are_tokens(tmp_path: Path) -> None:
    batches = list(ready(tmp_path).train_dataloader())
    real = torch.cat([(batch.inputs.document_ids >= 0).flatten() for batch in batches])
    assert real.float().mean() >= 0.99


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_mid_epoch_gives_the_same_batches(tmp_path: Path, workers: int) -> None:
    data = ready(tmp_path, num_workers=workers)
    length = data.batches_per_epoch
    undisturbed = list(data.train_dataloader())
    data.samples_consumed = 8 * length
    undisturbed += list(data.train_dataloader())
    again = ready(tmp_path, num_workers=workers)
    again.samples_consumed = 8 * 5
    resumed = list(again.train_dataloader())
    assert len(resumed) == length
    assert all(map(same, resumed, undisturbed[5:]))


def test_a_loader_asks_where_to_go_on_each_time(tmp_path: Path) -> None:
    data = ready(tmp_path)
    loader = data.train_dataloader()
    first = next(iter(loader))
    assert same(next(iter(loader)), first)
    data.samples_consumed = 8
    assert not same(next(iter(loader)), first)


def test_two_ranks_see_together_what_one_sees(tmp_path: Path) -> None:
    whole = next(iter(ready(tmp_path).train_dataloader()))
    for rank in range(2):
        data = ready(tmp_path)
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2, strategy=strategy)  # type: ignore[assignment]
        part = next(iter(data.train_dataloader()))
        assert torch.equal(part.inputs.input_ids, whole.inputs.input_ids[rank::2])
        assert torch.equal(part.targets, whole.targets[rank::2])


def test_the_batch_must_divide_by_the_devices(tmp_path: Path) -> None:
    data = ready(tmp_path, batch_size=9)
    data.trainer = SimpleNamespace(global_rank=0, world_size=2)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"data\.batch_size: 9 .* Set a multiple of 2"):
        data.train_dataloader()


def test_the_seed_changes_training_and_not_evaluation(tmp_path: Path) -> None:
    one, other = ready(tmp_path, seed=0), ready(tmp_path, seed=1)
    assert not same(next(iter(one.train_dataloader())), next(iter(other.train_dataloader())))
    assert all(map(same, one.val_dataloader(), other.val_dataloader()))


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    loader = ready(tmp_path).train_dataloader()
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("whole_word", [False, True])
def test_targets_of_full_rows(tmp_path: Path, whole_word: bool) -> None:
    data = ready(tmp_path, whole_word=whole_word, mask_rate=0.25)
    special = torch.tensor(data.tokenizer.special_ids)
    for batch in islice(data.train_dataloader(), 20):
        used = batch.targets != -100
        assert batch.targets.shape == (8, 8)
        assert not torch.isin(batch.targets[used], special).any()
        assert whole_word or used[(batch.inputs.document_ids >= 0).all(1)].all()


def test_the_unknown_share_is_of_text_and_not_of_the_template(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "dna.txt", ["acgt" * 40 + " acgt" * 3] * 20)
    data = ready(tmp_path, train_files=str(path), val_files=str(path), tokenizer_kind="wordpiece", vocab_size=40)
    assert data.statistics["train"].tokens == 20 * 6  # [CLS] [UNK] acgt acgt acgt [SEP]
    assert data.statistics["train"].unknown_fraction == 0.25


def test_text_of_which_every_token_is_unknown_is_refused(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "dna.txt", ["acgt" * 40] * 20)
    with pytest.raises(UserError, match=r"data\.train_files: every token is unknown\. Set data\.tokenizer_kind bpe"):
        ready(tmp_path, train_files=str(path), val_files=str(path), tokenizer_kind="wordpiece", vocab_size=40)


def test_accents_of_a_given_tokenizer_are_no_setting() -> None:
    with pytest.raises(UserError, match=r"data\.strip_accents: .* one is given"):
        MaskedLMData(tokenizer="vocab.txt", strip_accents=True)


@pytest.mark.parametrize("words", [ENGLISH, MULTILINGUAL, CHINESE])
@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_languages(tmp_path: Path, words: Any, kind: str) -> None:
    path = write_corpus(tmp_path / "text.txt", sentences(words, 300))
    data = ready(tmp_path, train_files=str(path), tokenizer_kind=kind, lowercase=False, vocab_size=500)
    assert data.statistics["train"].unknown_fraction < 0.001
    assert data.statistics["train"].documents > 200
    batch = next(iter(data.val_dataloader()))
    assert batch.inputs.input_ids.shape[1] == 32


def test_validation_files_and_an_existing_tokenizer(tmp_path: Path) -> None:
    val = write_corpus(tmp_path / "val.txt", sentences(ENGLISH, 20, seed=1))
    first = ready(tmp_path, val_files=str(val))
    assert first.statistics["train"].documents == 300
    assert first.statistics["val"].documents == 20
    first.tokenizer.save(tmp_path / "tokenizer")
    again = ready(tmp_path, val_files=str(val), tokenizer=str(tmp_path / "tokenizer"))
    assert again.cache("train").folder == first.cache("train").folder


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[MLMBatch] = []

    def training_step(self, batch: MLMBatch, _: int) -> torch.Tensor:
        self.seen.append(batch)
        self.trainer.datamodule.samples_consumed += len(batch)  # type: ignore[attr-defined]
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch: MLMBatch, _: int) -> None:
        assert isinstance(batch, MLMBatch)

    def predict_step(self, batch: PredictBatch, _: int) -> list[str]:
        return batch.texts

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(**settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, **(quiet | settings))


@pytest.mark.filterwarnings("ignore:.*num_workers")
def test_lightning_drives_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = Recorder(), make_data(tmp_path)
    make_trainer(max_epochs=2).fit(model, datamodule=data)
    assert len(model.seen) == 2 * data.batches_per_epoch
    positions = np.arange(8 * len(model.seen)).reshape(-1, 8)
    rows = data.train_dataloader().dataset
    assert all(same(batch, rows[place]) for batch, place in zip(model.seen, positions, strict=True))
    lines = tmp_path / "lines.txt"
    lines.write_text("a [MASK]\nb\nc\n")
    tokenizer = tmp_path / "tokenizer"
    data.tokenizer.save(tokenizer)
    predict = make_data(tmp_path, predict_files=str(lines), tokenizer=str(tokenizer), batch_size=2)
    assert make_trainer().predict(model, datamodule=predict) == [["a [MASK]", "b"], ["c"]]
    assert "ocument" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_rate": 0.0}, r"data\.mask_rate: 0\.0 is out of range\. Give a finite number from above 0 to below 1\."),
        ({"val_mask_rate": 1.0}, r"data\.val_mask_rate"),
        ({"val_share": 2}, r"data\.val_share"),
        ({"mask_split": (0.8, 0.1, 0.2)}, r"data\.mask_split: .* add up to 1"),
        ({"max_length": 7}, r"data\.max_length: 7 is out of range\. Give a whole number, 8 or more"),
        ({"batch_size": 0}, r"data\.batch_size"),
        ({"val_batch_size": 0}, r"data\.val_batch_size"),
        ({"num_workers": -1}, r"data\.num_workers"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MaskedLMData(**settings)


def test_prediction_says_what_it_lacks(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    with pytest.raises(UserError, match=r"data\.tokenizer: predict needs the model's tokenizer"):
        data.setup("predict")
    with pytest.raises(UserError, match=r"data\.predict_files: nothing to predict"):
        ready(tmp_path).predict_dataloader()


def test_whole_words_need_a_tokenizer_with_word_pieces(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n" + "\n".join(dict.fromkeys(ENGLISH)))
    data = ready(tmp_path, tokenizer=str(path), whole_word=True)
    with pytest.raises(UserError, match=r"data\.whole_word"):
        data.train_dataloader()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_for_cuda_are_pinned_and_know_where_documents_begin(tmp_path: Path, device: str) -> None:
    data = ready(tmp_path)
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1)  # type: ignore[assignment]
    loader = data.train_dataloader()
    assert loader.pin_memory is (device == "cuda")
    documents = next(iter(loader)).inputs.documents
    assert (documents is not None) is (device == "cuda")
    if documents is not None:
        assert documents.cu_seqlens[-1] == 8 * 32
        assert len(documents.before) == 9
