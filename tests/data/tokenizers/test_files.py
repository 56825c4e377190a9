"""The ids of a folder are those that transformers gives it, or it is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + letter for letter in LETTERS)]
BERT += ["the", "green", "lamp", "Lamp", "möchte", "mochte", "ö", "##ö", "東", "##京", "東京", "[", "]", "<", ">", "."]
SPELLED_OTHERWISE = ["<PAD>", "<UNK>", "<BEG>", "<END>", "<BLANK>", *BERT[5:]]
TEXTS = [
    "the green lamp",
    "The Lamp möchte Mo\u0308chte, mochte.",
    "東京 東 the",
    "a 😀 lamp 👩‍👩‍👧",
    "the [MASK] lamp[MASK]. [UNK] [SEP]",
    "zorblax and zorblaxian quindle Zorblax",
    "<ent> a<ent>b <Ent>  <ent> ",
    "<mask> the<mask> <s> a</s>",
    "<BLANK> the <UNK>",
    "keep#me keep me",
    "tab\tand\u200bzero\x00\x07\ufeffend\r\n next",
    "",
    " ",
    "x" * 120,
    "l" * 3000,
    "  two  spaces   ",
]

Make = Callable[[Path], None]
FOLDERS: dict[str, Make] = {}


def folder(make: Make) -> Make:
    FOLDERS[make.__name__] = make
    return make


def put(path: Path, **values: Any) -> None:
    """Write JSON files: `tokenizer_config={...}` becomes tokenizer_config.json."""
    for name, value in values.items():
        (path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")


def bert(path: Path, tokens: list[str] = BERT, **config: Any) -> None:
    (path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    put(path, tokenizer_config={"tokenizer_class": "BertTokenizer", **config})


def entry(content: str, **flags: bool) -> dict[str, Any]:
    usual = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content, **usual, **flags}


@folder
def plain(path: Path) -> None:
    bert(path)


@folder
def cased(path: Path) -> None:
    bert(path, do_lower_case=False)


@folder
def accents_kept(path: Path) -> None:
    bert(path, strip_accents=False)


@folder
def accents_stripped_of_cased(path: Path) -> None:
    bert(path, do_lower_case=False, strip_accents=True)


@folder
def chinese_together(path: Path) -> None:
    bert(path, tokenize_chinese_chars=False)


@folder
def never_split(path: Path) -> None:
    bert(path, never_split=["keep#me", "the"], do_basic_tokenize=False, model_max_length=4)


@folder
def added_tokens(path: Path) -> None:
    bert(path)
    put(path, added_tokens={"zorblax": len(BERT), "quindle": len(BERT) + 1})


@folder
def added_tokens_out_of_order_with_gaps(path: Path) -> None:
    bert(path, mask_token="<mask>")
    put(path, added_tokens={"quindle": len(BERT) + 50, "zorblax": len(BERT) + 7, "<mask>": len(BERT) + 9})


@folder
def added_tokens_decoder(path: Path) -> None:
    decoder = {
        "4": entry("[MASK]", lstrip=True),
        "100": entry("zorblax", normalized=True, special=False, single_word=True),
        "101": entry("<ent>", rstrip=True),
    }
    bert(path, added_tokens_decoder=decoder)
    put(path, added_tokens={"quindle": len(BERT)})


@folder
def added_in_both_places(path: Path) -> None:
    bert(path, additional_special_tokens=["<ent>", "zorblax"])
    put(path, added_tokens={"zorblax": len(BERT), "<ent>": len(BERT) + 1, "lamp": 60})


@folder
def additional_special_tokens(path: Path) -> None:
    bert(path, additional_special_tokens=["<ent>", "quindle"], image_token="zorblax")


@folder
def extra_special_tokens_by_name(path: Path) -> None:
    bert(path, extra_special_tokens={"entity_token": "<ent>"})


@folder
def names_in_special_tokens_map(path: Path) -> None:
    bert(path, SPELLED_OTHERWISE)
    names = dict(zip(("pad", "unk", "cls", "sep"), SPELLED_OTHERWISE[:4], strict=True))
    mask = {**entry("<BLANK>", lstrip=True), "special": False}
    put(path, special_tokens_map={**{f"{role}_token": token for role, token in names.items()}, "mask_token": mask})


@folder
def names_in_tokenizer_config(path: Path) -> None:
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    bert(path, SPELLED_OTHERWISE, **dict(zip(roles, SPELLED_OTHERWISE[:5], strict=True)))


@folder
def mask_of_the_configuration_alone(path: Path) -> None:
    bert(path, mask_token={**entry("<mask>"), "__type": "AddedToken"})


@folder
def repeated_and_blank_lines(path: Path) -> None:
    bert(path, [*BERT[:20], "lamp", "", "the", *BERT[20:], "", "the"])
    put(path, added_tokens={"zorblax": 0})


@folder
def carriage_returns_and_trailing_spaces(path: Path) -> None:
    bert(path)
    (path / "vocab.txt").write_bytes("".join(f"{token} \u3000\r\n" for token in BERT).encode())


@folder
def class_of_the_model_alone(path: Path) -> None:
    bert(path)
    (path / "tokenizer_config.json").unlink()
    put(path, config={"model_type": "bert"})


@folder
def distilbert(path: Path) -> None:
    bert(path, tokenizer_class="DistilBertTokenizerFast", do_lower_case=False)
    put(path, config={"model_type": "distilbert"})


def whole(path: Path, **config: Any) -> Tokenizer:
    """Write a cased tokenizer.json of WordPiece that keeps Chinese together, and its configuration."""
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(BERT)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, handle_chinese_chars=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    frame = {"special_tokens": [("[CLS]", 2), ("[SEP]", 3)]}
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP] [SEP]", **frame)
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True), "[CLS]", "[SEP]"])
    tokenizer.add_tokens([AddedToken("zorblax", single_word=True), AddedToken("<ent>", rstrip=True, normalized=False)])
    tokenizer.enable_truncation(5)
    tokenizer.save(str(path / "tokenizer.json"))
    if config:
        put(path, tokenizer_config=config)
    return tokenizer


@folder
def json_as_it_is(path: Path) -> None:
    whole(path, tokenizer_class="PreTrainedTokenizerFast", do_lower_case=True, unk_token="[UNK]", mask_token="[MASK]")


@folder
def json_alone(path: Path) -> None:
    whole(path)


@folder
def json_rebuilt_for_bert(path: Path) -> None:
    whole(path, tokenizer_class="BertTokenizerFast")


@folder
def json_rebuilt_with_other_settings(path: Path) -> None:
    decoder = {"4": entry("[MASK]"), "75": entry("quindle", special=False)}
    whole(path, tokenizer_class="BertTokenizer", do_lower_case=True, strip_accents=False, added_tokens_decoder=decoder)


@folder
def json_with_tokens_named_beside_it(path: Path) -> None:
    whole(path, tokenizer_class="PreTrainedTokenizerFast", mask_token="<BLANK>", additional_special_tokens=["quindle"])
    put(path, added_tokens={"keep#me": 90})


@folder
def json_of_modernbert(path: Path) -> None:
    whole(path, tokenizer_class="BertTokenizer", mask_token="[MASK]")
    put(path, config={"model_type": "modernbert"})


def byte_level(path: Path, **config: Any) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *alphabet, "th", "the", "Ġt", "Ġth", "Ġthe", "la", "<mask>"]
    put(path, vocab={token: i for i, token in enumerate(tokens)}, tokenizer_config=config)
    merges = ["t h", "th e", "Ġ t", "Ġt h", "Ġth e", "l a"]
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


@folder
def roberta(path: Path) -> None:
    byte_level(path, tokenizer_class="RobertaTokenizer")


@folder
def roberta_with_a_space_before_the_text(path: Path) -> None:
    byte_level(path, tokenizer_class="RobertaTokenizerFast", add_prefix_space=True, mask_token="<mask>")
    put(path, special_tokens_map={"mask_token": entry("<mask>", lstrip=True)}, added_tokens={"zorblax": 300})


@folder
def roberta_by_its_model(path: Path) -> None:
    byte_level(path)
    put(path, config={"model_type": "roberta"}, tokenizer_config={})


@folder
def gpt2_with_a_mask(path: Path) -> None:
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<s>")
    byte_level(path, tokenizer_class="GPT2Tokenizer", mask_token="<mask>", pad_token="<pad>", **names)


@folder
def gpt2_with_a_token_before_the_text(path: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
    byte_level(path, tokenizer_class="GPT2Tokenizer", add_bos_token=True, add_eos_token=False, **names)


def peer(path: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("make", FOLDERS.values(), ids=FOLDERS.keys())
def test_ids_are_those_of_transformers(tmp_path: Path, make: Make) -> None:
    make(tmp_path)
    ours, theirs = TextTokenizer.from_file(tmp_path), peer(tmp_path)
    expected = [theirs(text)["input_ids"] for text in TEXTS]
    assert ours.encode_batch(TEXTS) == expected
    assert ours.vocab_size == 1 + max(theirs.get_vocab().values())
    assert theirs.mask_token is None or ours.mask_id == theirs.mask_token_id
    assert theirs.pad_token is None or ours.pad_id == theirs.pad_token_id
    again = TextTokenizer.from_json(ours.to_json())  # as in a checkpoint
    assert (again.encode_batch(TEXTS), again.mask_id) == (expected, ours.mask_id)
    (tmp_path / "config.json").unlink(missing_ok=True)
    for target in (tmp_path / "saved", tmp_path):  # into an empty folder, and over the old files
        ours.save(target)
        saved, theirs = TextTokenizer.from_file(target), peer(target)
        assert (saved.encode_batch(TEXTS), saved.mask_id) == (expected, ours.mask_id)
        assert [theirs(text)["input_ids"] for text in TEXTS] == expected
        assert theirs.mask_token_id == ours.mask_id
        assert theirs.pad_token is None or theirs.pad_token_id == ours.pad_id


def random_folder(path: Path, generator: random.Random) -> None:
    """Write files that name, add and flag tokens in several places, which contradict each other."""

    def sometimes(chance: float = 0.3) -> bool:
        return generator.random() < chance

    def token(content: str) -> Any:
        flags = {name: sometimes() for name in ("lstrip", "rstrip", "single_word", "normalized")}
        return generator.choice([content, {**entry(content, **flags), "__type": "AddedToken"}])

    kind = generator.choice(["bert", "json", "bytes"])
    spelled = {role: f"[{role.upper()}]" for role in ("mask", "pad", "cls", "unk", "sep")}
    if kind == "bytes":
        spelled = {"mask": "<mask>", "pad": "<pad>", "cls": "<s>", "unk": "<unk>", "sep": "</s>", "bos": "<s>"}
    config = {f"{role}_token": token(name) for role, name in spelled.items() if sometimes()}
    settings = ("do_lower_case", "tokenize_chinese_chars", "strip_accents", "add_prefix_space")
    config |= {name: sometimes(0.5) for name in settings if sometimes()}
    if sometimes():
        config["additional_special_tokens"] = [token("<ent>"), token("zorblax")][: generator.randrange(3)]
    if sometimes(0.2):
        config["extra_special_tokens"] = generator.choice([["quindle"], {"x_token": "quindle"}, [], {}])
    if sometimes(0.2):
        chosen = generator.sample(["zorblax", spelled["mask"], "<ent>", "lamp"], 2)
        config["added_tokens_decoder"] = {str(i): entry(name, lstrip=sometimes()) for i, name in enumerate(chosen, 70)}
    classes = {"bert": ["BertTokenizer", "ElectraTokenizerFast"], "bytes": ["RobertaTokenizer", "BartTokenizerFast"]}
    config["tokenizer_class"] = generator.choice(classes.get(kind, ["BertTokenizer", "TokenizersBackend"]))
    {"bert": bert, "json": whole, "bytes": byte_level}[kind](path)
    put(path, tokenizer_config=config)
    if sometimes():
        further = generator.choice([["<ent>"], ["quindle", "zorblax"]])
        put(path, special_tokens_map={"mask_token": entry(spelled["mask"]), "additional_special_tokens": further})
    if sometimes():
        put(
            path,
            added_tokens={name: i for i, name in enumerate(["zorblax", "quindle", "<ent>", "lamp"], 80) if sometimes()},
        )
    if sometimes():
        put(path, config={"model_type": generator.choice(["bert", "roberta", "distilbert"])})


def test_ids_of_files_that_contradict_each_other_are_those_of_transformers(tmp_path: Path) -> None:
    generator = random.Random(3)
    for number in range(60):
        path = tmp_path / str(number)
        path.mkdir()
        random_folder(path, generator)
        ours, theirs = TextTokenizer.from_file(path), peer(path)
        assert ours.encode_batch(TEXTS) == [theirs(text)["input_ids"] for text in TEXTS], path
        assert ours.vocab_size == 1 + max(theirs.get_vocab().values())


def test_a_byte_order_mark_is_no_part_of_the_first_token(tmp_path: Path) -> None:
    bert(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(BERT), encoding="utf-8-sig")
    tokenizer = TextTokenizer.from_file(tmp_path)
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (0, len(BERT))


def test_of_a_vocabulary_with_no_configuration_the_case_is_that_of_its_tokens(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(BERT), encoding="utf-8")
    assert TextTokenizer.from_file(tmp_path).encode_bare(["Lamp lamp"]) == [[60, 59]]


def test_the_file_itself_is_taken_as_it_is(tmp_path: Path) -> None:
    inner = whole(tmp_path, tokenizer_class="SomeTokenizer", mask_token="<ent>")
    inner.no_truncation()
    tokenizer = TextTokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.mask_token == "<ent>"
    assert tokenizer.encode_batch(TEXTS) == [inner.encode(text).ids for text in TEXTS]


def refused(name: str, **files: Any) -> Any:
    return pytest.param(files, id=name)


@pytest.mark.parametrize(
    "files",
    [
        refused("mecab", tokenizer_config={"tokenizer_class": "BertJapaneseTokenizer"}, says="MeCab"),
        refused("other class", tokenizer_config={"tokenizer_class": "AlbertTokenizer"}, says="class of .*, AlbertTok"),
        refused("other model", config={"model_type": "albert"}, says=r"known here\. Give a folder with a tokenizer"),
        refused("class of the model", config={"tokenizer_class": "XLNetTokenizer"}, says="XLNetTokenizer, is not"),
        refused(
            "code", tokenizer_config={"tokenizer_class": "A", "auto_map": {"AutoTokenizer": ["a.A", None]}}, says="code"
        ),
        refused("null", tokenizer_config={"tokenizer_class": "BertTokenizer", "cls_token": None}, says="cls_token is"),
        refused("split", tokenizer_config={"split_special_tokens": True}, says="no text holds a mask"),
        refused("number", tokenizer_config={"tokenizer_class": "BertTokenizer", "do_lower_case": "yes"}, says="bool"),
        refused("list", tokenizer_config=[1], says="holds no JSON object"),
        refused("entry", tokenizer_config={"added_tokens_decoder": {"a": 1}}, says="not a tokenizer that can be read"),
        refused("added", added_tokens={"zorblax": "first"}, says="not a tokenizer that can be read"),
        refused("merges", tokenizer_config={"tokenizer_class": "RobertaTokenizer"}, says="nor vocab.json and merges"),
        refused("file class", tokenizer_config={"tokenizer_class": "TokenizersBackend"}, says=None),
    ],
)
def test_other_folders_are_refused_in_one_line(tmp_path: Path, files: dict[str, Any]) -> None:
    says = files.pop("says")
    (tmp_path / "vocab.txt").write_text("\n".join(BERT), encoding="utf-8")
    put(tmp_path, **files)
    if says is None:
        assert TextTokenizer.from_file(tmp_path).vocab_size == len(BERT)
        return
    with pytest.raises(UserError, match=says) as caught:
        TextTokenizer.from_file(tmp_path)
    assert "\n" not in str(caught.value)


def test_sentencepiece_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    put(tmp_path, config={"model_type": "bert"})
    (tmp_path / "spiece.model").write_bytes(b"\n\x0e")
    with pytest.raises(UserError, match=r"spiece\.model alone.*save_pretrained"):
        TextTokenizer.from_file(tmp_path)


def test_a_tokenizer_json_of_another_class_says_how_to_take_it(tmp_path: Path) -> None:
    whole(tmp_path, tokenizer_class="CanineTokenizer")
    with pytest.raises(UserError, match=r"To take its tokenizer\.json as it is, give .*/tokenizer\.json"):
        TextTokenizer.from_file(tmp_path)
