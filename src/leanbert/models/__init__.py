"""Plain-torch models."""

from leanbert.models.build import build_model
from leanbert.models.config import EncoderConfig
from leanbert.models.convert import read_huggingface, write_huggingface
from leanbert.models.mlm import MaskedLanguageModel

__all__ = [
    "EncoderConfig",
    "MaskedLanguageModel",
    "build_model",
    "read_huggingface",
    "write_huggingface",
]
