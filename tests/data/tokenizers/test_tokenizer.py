from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from tests.data.corpora import ENGLISH, sentences

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "mill", "##s", "##er", "river", ",", "[", "]", "mask"]


@pytest.fixture
def vocab_file(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return path


def roberta() -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<mask>", "<pad>", "Ġthe", "t", "h", "e", "Ġ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")] if "th" in vocabulary else []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    tokenizer.add_special_tokens(["<s>", "</s>", "<mask>", "<pad>"])
    return tokenizer


def test_vocab_txt_is_read_as_bert_reads_it(vocab_file: Path) -> None:
    tokenizer = TextTokenizer.from_file(vocab_file)
    assert tokenizer.vocab_size == 14
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert tokenizer.special_ids == [0, 1, 2, 3, 4]
    assert tokenizer.encode_batch(["The Mills, [MASK] xyz", ""]) == [[2, 5, 6, 7, 10, 4, 1, 3], [2, 3]]
    assert tokenizer.decode([2, 5, 6, 7, 3]) == "the mills"
    assert tokenizer.token(7) == "##s"


def test_a_corpus_may_spell_special_tokens(vocab_file: Path) -> None:
    tokenizer = TextTokenizer.from_file(vocab_file)
    assert tokenizer.encode_batch(["[MASK]"], literal=True) == [[2, 11, 13, 12, 3]]
    assert tokenizer.encode_batch(["[MASK]"]) == [[2, 4, 3]]


def test_a_cased_vocab_txt_keeps_case(tmp_path: Path, vocab_file: Path) -> None:
    vocab_file.write_text("\n".join([*VOCAB, "Mill"]), encoding="utf-8")
    assert TextTokenizer.from_file(vocab_file).encode_batch(["Mill mill"]) == [[2, 14, 6, 3]]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert TextTokenizer.from_file(tmp_path).encode_batch(["Mill mill"]) == [[2, 6, 6, 3]]


def test_an_existing_template_is_respected() -> None:
    tokenizer = TextTokenizer(roberta())
    assert tokenizer.template == ([0], [1])
    assert tokenizer.encode_batch(["the<mask>"]) == [[0, 5, 6, 7, 2, 1]]
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.pad_id) == (0, 1, 2, 3)
    assert tokenizer.unk_id is None
    assert tokenizer.mask_token == "<mask>"


def test_padding_and_truncation_of_the_file_are_switched_off() -> None:
    inner = roberta()
    inner.enable_truncation(4)
    inner.enable_padding(length=16)
    assert TextTokenizer.from_json(inner.to_str()).encode_batch(["thethe"]) == [[0, 5, 6, 7, 5, 6, 7, 1]]


def test_continuations(vocab_file: Path) -> None:
    assert np.flatnonzero(TextTokenizer.from_file(vocab_file).continuation_table()).tolist() == [7, 8]
    assert np.flatnonzero(TextTokenizer(roberta()).continuation_table()).tolist() == [5, 6, 7]
    unigram = Tokenizer(models.Unigram([("[UNK]", 0.0), ("[MASK]", 0.0), ("▁the", -1.0), ("s", -2.0)], unk_id=0))
    unigram.add_special_tokens(["[UNK]", "[MASK]"])
    assert np.flatnonzero(TextTokenizer(unigram).continuation_table()).tolist() == [3]


def test_tokens_that_do_not_tell_continue_no_word(vocab_file: Path) -> None:
    tokens = ["[UNK]", "[MASK]", "the", "ri", "ver</w>"]
    numbered = {token: i for i, token in enumerate(tokens)}
    words = Tokenizer(models.WordLevel(numbered, unk_token="[UNK]"))
    marked = Tokenizer(models.BPE(numbered, [], unk_token="[UNK]", end_of_word_suffix="</w>"))
    for inner in (words, marked):
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        assert not TextTokenizer(inner).continuation_table().any()
    added = TextTokenizer.from_file(vocab_file)._tokenizer
    added.add_tokens(["##s", "##ing"])
    assert np.flatnonzero(TextTokenizer(added).continuation_table()).tolist() == [8]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_saved_folders_load_everywhere(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    documents = sentences(ENGLISH, 60)
    tokenizer = TextTokenizer.train(lambda: documents, kind=kind, vocab_size=320)
    tokenizer.save(tmp_path)
    again = TextTokenizer.from_file(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The river, [MASK] 17 sailors"
    assert again.to_json() == tokenizer.to_json()
    assert peer(text)["input_ids"] == tokenizer.encode_batch([text])[0]
    assert peer.mask_token_id == tokenizer.mask_id
    assert peer.pad_token_id == tokenizer.pad_id


def test_a_checkpoint_carries_its_tokenizer(tmp_path: Path, vocab_file: Path) -> None:
    tokenizer = TextTokenizer.from_file(vocab_file)
    torch.save({"leanbert": {"tokenizer": tokenizer.to_json()}}, tmp_path / "a.ckpt")
    assert TextTokenizer.from_file(tmp_path / "a.ckpt").to_json() == tokenizer.to_json()


class Bomb:
    def __reduce__(self) -> tuple:
        return (print, ("code ran",))


def test_bad_files_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_mask = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    files = {
        "absent.json": (None, "does not exist"),
        "n" * 5000: (None, "does not exist"),
        "empty": (None, "holds neither tokenizer.json nor vocab.txt"),
        "broken.json": ('{"model": ', "not a tokenizer.json"),
        "nomask.json": (no_mask.to_str(), "no mask token"),
        "vocab.txt": ("[PAD]\nthe\n", r"no \[UNK\] \[CLS\] \[SEP\] \[MASK\]"),
        "unknown.txt": ("\n".join(token for token in VOCAB if token != "[UNK]"), r"no \[UNK\] in it"),
        "pointer.json": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        "nul.json": ("\x00" * 9, "not a tokenizer.json"),
        "nothing.json": ("", "not a tokenizer.json"),
        "deep.json": ('{"model":' + "[" * 100_000, "not a tokenizer.json"),
        "latin.txt": (b"\xff\xfe", "cannot be read"),
        "bad.ckpt": ("not a checkpoint", "damaged, or no file"),
    }
    (tmp_path / "empty").mkdir()
    torch.save({"model": 1}, tmp_path / "other.ckpt")
    torch.save({"leanbert": Bomb()}, tmp_path / "code.ckpt")
    cases = [(name, content, message) for name, (content, message) in files.items()]
    cases += [("other.ckpt", None, "no tokenizer in this checkpoint"), ("code.ckpt", None, "could execute code")]
    for name, content, message in cases:
        if content is not None:
            (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(UserError, match=message) as caught:
            TextTokenizer.from_file(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


def test_json_is_stable() -> None:
    text = TextTokenizer(roberta()).to_json()
    assert TextTokenizer.from_json(text).to_json() == text
    assert json.loads(text)["truncation"] is None
