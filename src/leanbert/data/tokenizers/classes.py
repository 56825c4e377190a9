"""The tokenizer classes of transformers that make their tokenizer anew of a vocabulary and a few settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from leanbert.data.tokenizers.probe import parse_tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Special tokens of BERT and of the tokenizers trained here, with ids 0 to 4."""


def bert_pipeline(
    model: models.Model, lowercase: bool, strip_accents: bool | None = None, chinese: bool = True
) -> Tokenizer:
    """Return a tokenizer with BERT's normaliser (Chinese characters apart) and pre-tokenizer around `model`."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def add_bert_template(tokenizer: Tokenizer, cls: str = "[CLS]", sep: str = "[SEP]") -> None:
    """Make the tokenizer write `[CLS] a [SEP]`, and `[CLS] a [SEP] b [SEP]` with segments 0 and 1."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[_numbered(tokenizer, token) for token in (cls, sep)],
    )


class Family(NamedTuple):
    """A tokenizer class of transformers: the tokens that it names itself, its files, what it builds of them."""

    defaults: dict[str, str]
    files: tuple[str, ...]
    build: Callable[[dict[str, Any], dict[str, Any]], Tokenizer]
    frame: Callable[[Tokenizer, dict[str, Any], dict[str, Any]], None]
    """Give the tokenizer its template, once its special tokens have their ids."""


def _build_bert(source: dict[str, Any], config: dict[str, Any]) -> Tokenizer:
    model = models.WordPiece(source["vocab"], unk_token=str(config["unk_token"]))
    case, chinese = config.get("do_lower_case", True), config.get("tokenize_chinese_chars", True)
    tokenizer = bert_pipeline(model, case, config.get("strip_accents"), chinese)
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _build_byte_level(source: dict[str, Any], config: dict[str, Any]) -> Tokenizer:
    model = models.BPE(source["vocab"], source["merges"], continuing_subword_prefix="", end_of_word_suffix="")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space", False))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _frame_roberta(tokenizer: Tokenizer, source: dict[str, Any], config: dict[str, Any]) -> None:
    flags = config.get("trim_offsets", True), config.get("add_prefix_space", False)
    frame: list[Any] = [_numbered(tokenizer, str(config[role])) for role in ("sep_token", "cls_token")]
    tokenizer.post_processor = processors.RobertaProcessing(frame[0], frame[1], *flags)


def _numbered(tokenizer: Tokenizer, token: str) -> tuple[str, int | None]:
    return token, tokenizer.token_to_id(token)


def _frame_gpt2(tokenizer: Tokenizer, source: dict[str, Any], config: dict[str, Any]) -> None:
    if "text" in source:
        tokenizer.post_processor = parse_tokenizer(source["text"], "tokenizer.json").post_processor
        return
    before, after = (
        [str(config[f"{role}_token"])] if config.get(f"add_{role}_token") else [] for role in ("bos", "eos")
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[_numbered(tokenizer, token) for token in (*before, *after)],
    )


def _roles(**tokens: str) -> dict[str, str]:
    return {f"{role}_token": token for role, token in tokens.items()}


BERT = Family(
    _roles(pad="[PAD]", unk="[UNK]", cls="[CLS]", sep="[SEP]", mask="[MASK]"),
    ("vocab.txt",),
    _build_bert,
    lambda tokenizer, _, config: add_bert_template(tokenizer, str(config["cls_token"]), str(config["sep_token"])),
)
ROBERTA = Family(
    _roles(bos="<s>", eos="</s>", unk="<unk>", sep="</s>", pad="<pad>", cls="<s>", mask="<mask>"),
    ("vocab.json", "merges.txt"),
    _build_byte_level,
    _frame_roberta,
)
GPT2 = Family(
    _roles(bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>"),
    ROBERTA.files,
    _build_byte_level,
    _frame_gpt2,
)

FAMILIES = {
    **dict.fromkeys(("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer"), BERT),
    **dict.fromkeys(("SqueezeBertTokenizer", "LayoutLMTokenizer", "LxmertTokenizer"), BERT),
    **dict.fromkeys(("RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "LEDTokenizer"), ROBERTA),
    "GPT2Tokenizer": GPT2,
}
FILE_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
FILE_MODELS = ("modernbert", "modernbert-decoder")
"""Models whose tokenizer.json is taken whatever class their files name."""

MODELS = {
    **dict.fromkeys(("bert", "distilbert", "electra", "convbert", "mobilebert", "megatron-bert"), "BertTokenizer"),
    **dict.fromkeys(("squeezebert", "layoutlm", "ernie", "nezha", "lxmert", "nomic_bert"), "BertTokenizer"),
    **dict.fromkeys(("roberta", "longformer", "bart", "roberta-prelayernorm", "data2vec-text"), "RobertaTokenizer"),
    "gpt2": "GPT2Tokenizer",
}
