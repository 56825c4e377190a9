"""Sequence to sequence: an encoder, a decoder that looks at its output, and a head tied to the token embedding.

Shapes: B batch, S source tokens, T target tokens, D hidden, V vocabulary of targets, R rows stored for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leanbert.errors import UserError
from leanbert.models.attention import CrossAttention
from leanbert.models.base import EncoderModel
from leanbert.models.config import ResolvedConfig
from leanbert.models.decoder import Decoder, DecoderBlock
from leanbert.models.decoding_cache import Cache
from leanbert.models.encoder import Block, Stack
from leanbert.models.heads import MaskedLMHead
from leanbert.models.kernels.loss import Mixture
from leanbert.models.packed_inputs import PackedInputs
from leanbert.models.pointer import Copied, Pointer, add_copied, copied_log_probs
from leanbert.models.stored import ModelMetadata, Start, Stored

PASSED_ON = 0.7
"""What each of the two maps of a warm-started cross-attention first multiplies what it reads by."""


class Seq2SeqModel(EncoderModel):
    """Encoder, decoder and output head; source and target have one vocabulary and one token embedding, or their own.

    Args:
        config: Architecture of the encoder and, but for the number of blocks, of the decoder.
        decoder_layers: Blocks of the decoder; None: as many as the encoder has.
        start: Where the decoder's weights come from (Rothe et al. 2020, arXiv 1907.12461).
        target_vocab_size: Tokens of targets that have a vocabulary of their own; None: both have one.
        copy: Whether the next token may be copied from the source (`Pointer`).

    Raises:
        UserError: `copy` with a vocabulary of targets, whose ids mean other tokens than the sources' ids.

    """

    task = "seq2seq"

    def __init__(
        self, config: ResolvedConfig, decoder_layers: int | None, start: Start,
        target_vocab_size: int | None = None, copy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(config)
        if copy and target_vocab_size is not None:
            raise UserError(
                "model.copy: sources and targets have their own tokenizers. Leave out data.target_tokenizer, "
                "or set model.copy to false"
            )
        self.start = start
        self.target_vocab_size = target_vocab_size
        self.decoder = Decoder(config, decoder_layers or config.num_layers, target_vocab_size)
        self.head = MaskedLMHead(config if target_vocab_size is None else replace(config, vocab_size=target_vocab_size))
        self.pointer = Pointer(config) if copy else None
        if start == "shared":
            self._share()

    @property
    def target_table(self) -> Tensor:
        """The token embedding of targets, [R, D]: the head's output matrix too."""
        own = self.encoder.embeddings if self.target_vocab_size is None else self.decoder.embeddings
        return own.token.weight

    @property
    def token_tables(self) -> list[tuple[Tensor, int]]:
        """The token embeddings, [R, D] each, and how many of their rows are tokens."""
        own = [] if self.target_vocab_size is None else [(self.target_table, self.target_vocab_size)]
        return super().token_tables + own

    @property
    def stacks(self) -> list[Stack]:
        """Encoder and decoder."""
        return [self.encoder, self.decoder]

    def inherits(self, name: str, metadata: ModelMetadata) -> bool:
        """Whether weight `name` of a stored model is taken over: of a masked language model the head of its tokens."""
        if metadata.task == "mlm" and self.target_vocab_size is None and name.startswith("head."):
            return True
        return super().inherits(name, metadata)

    def check_stored(self, stored: Stored, state: Mapping[str, Tensor]) -> None:
        """Raise `UserError` if a stored decoder has another depth or vocabulary, or weights that ours has shared."""
        layers, source, metadata = len(self.decoder.blocks), stored.source, stored.metadata
        if (found := metadata.decoder_layers or stored.config.num_layers) != layers:
            raise UserError(f"model.decoder_layers: {layers}, but {source} has {found}. Set it to {found}")
        known, tokens = metadata.target_vocab_size, self.target_vocab_size
        if (known is None) != (tokens is None):
            has, fix = ("one tokenizer for sources and targets", "Leave it out")
            if tokens is None:
                has, fix = ("one of its own for targets", f"Set it to {source}")
            raise UserError(f"data.target_tokenizer: the model at {source} has {has}. {fix}")
        if known != tokens:
            raise UserError(
                f"data.target_tokenizer: has {tokens} tokens, the decoder of {source} knows {known}. Set it to {source}"
            )
        if bool(metadata.copy) != (self.pointer is not None):
            there = "has a pointer" if self.pointer is None else "has no pointer"
            raise UserError(f"model.copy: the model at {source} {there}. Set it to {str(self.pointer is None).lower()}")
        names: dict[int, str] = {}
        for name, parameter in self.state_dict(keep_vars=True).items():
            shared = {name, names.setdefault(id(parameter), name)} & state.keys()
            if len(shared) > 1 and not torch.equal(*(state[each] for each in shared)):
                raise UserError(
                    f"model.decoder_start: {self.start}, but the decoder of {source} has weights of its own. "
                    "Set it to encoder"
                )

    def warm_start(self) -> None:
        """Copy the encoder's weights into the decoder: blocks evenly chosen, cross-attention's queries and keys too.

        What cross-attention reads it passes on as it is: the head that was trained to name the token of an encoding
        names those that the decoder looks at.
        """
        if self.start == "random":
            return
        for number, (source, block) in enumerate(self._corresponding_blocks()):
            _copy_block(source, block, first=number == 0)
        own, theirs = self.decoder.embeddings, self.encoder.embeddings
        copied = {name: weight for name, weight in theirs.state_dict().items() if not name.startswith("token.")}
        own.load_state_dict(own.state_dict() | copied)
        self.decoder.final_norm.load_state_dict(self.encoder.final_norm.state_dict())
        if self.pointer is not None:
            self.pointer.initialise_to_identity()

    def _corresponding_blocks(self) -> list[tuple[Any, Any]]:
        """Return each block of the decoder after the encoder's that it begins with, evenly chosen."""
        count, layers = len(self.decoder.blocks), len(self.encoder.blocks)
        return [(self.encoder.blocks[i * layers // count], block) for i, block in enumerate(self.decoder.blocks)]

    def check_sharing(self) -> None:
        """Raise `UserError` if the decoder's blocks are not those of the encoder that it begins with, evenly chosen."""
        pairs = self._corresponding_blocks() if self.start == "shared" else []
        if any(block.attention is not source.attention for source, block in pairs):
            raise UserError(
                "the decoder shares its blocks with the encoder, whose depth is another. "
                "Give a fraction that leaves both whole multiples, or decoder_start=encoder"
            )

    def _share(self) -> None:
        """Let the decoder's blocks use the encoder's self-attention and feed-forward."""
        for source, block in self._corresponding_blocks():
            block.attention, block.feed_forward = source.attention, source.feed_forward
            block.feed_forward_norm = source.feed_forward_norm
            if type(block.attention_norm) is type(source.attention_norm):
                block.attention_norm = source.attention_norm

    def hidden(  # type: ignore[override]
        self, inputs: PackedInputs, decoder_inputs: PackedInputs
    ) -> tuple[Tensor, Copied | None]:
        """Hidden states [B, T, D] for sources [B, S] and what the decoder reads [B, T].

        And what is copied from the sources, if the model does that.
        """
        memory = self.encode(inputs)
        hidden = self.decoder(decoder_inputs, self.target_table, memory, inputs.document_ids)
        if self.pointer is None:
            return hidden, None
        allowed = decoder_inputs.document_ids[:, :, None] == inputs.document_ids[:, None, :]
        return hidden, self.pointer(hidden, self.pointer.read(memory, inputs.input_ids, allowed))

    def logits(self, hidden: Tensor, copied: Copied | None = None) -> Tensor:
        """Logits [B, T, V] of decoder states [B, T, D] and what is copied."""
        scores = self.head(hidden, self.target_table)
        return scores if copied is None else add_copied(scores, copied)

    def start_decoding(self, inputs: PackedInputs, beams: int, positions: int) -> Cache:
        """Return what decodes token by token: arguments as of `Cache`."""
        return Cache(self, inputs, beams, positions)

    def loss_sum(
        self, inputs: PackedInputs, decoder_inputs: PackedInputs, targets: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """Cross entropy (nats, shape []) summed over `targets` (int64 [B, T], -100: none), labels smoothed if wanted.

        Labels are smoothed over the whole vocabulary: Szegedy et al. 2016, arXiv 1512.00567.
        """
        hidden, copied = self.hidden(inputs, decoder_inputs)
        mixture = None
        if copied is not None:
            mixture = Mixture(copied.log_generate.flatten(), copied_log_probs(copied, targets).flatten())
        return self.head.loss_sum(hidden, self.target_table, targets, self.head_chunk, smoothing, mixture)


@torch.no_grad()
def _copy_block(source: Block, block: DecoderBlock, *, first: bool) -> None:
    for part in ("attention", "feed_forward", "feed_forward_norm", "attention_norm"):
        weights = getattr(source, part).state_dict()
        if weights or first:
            own = getattr(block, part)
            own.load_state_dict(weights if own.state_dict() else {})
    cross: CrossAttention = block.cross_attention
    query, key, _ = source.attention.qkv.weight.chunk(3)
    cross.query.weight.copy_(query)
    cross.key_value.weight.copy_(torch.cat((key, _identity(key) * PASSED_ON)))
    cross.output.weight.copy_(_identity(cross.output.weight) * PASSED_ON)
    if source.attention.qkv.bias is not None:
        query_bias, key_bias, _ = source.attention.qkv.bias.chunk(3)
        cross.query.bias.copy_(query_bias)
        cross.key_value.bias.copy_(torch.cat((key_bias, torch.zeros_like(key_bias))))
        cross.output.bias.zero_()


def _identity(like: Tensor) -> Tensor:
    """Return a matrix of the same shape with ones on its diagonal."""
    return torch.eye(*like.shape, dtype=like.dtype, device=like.device)
