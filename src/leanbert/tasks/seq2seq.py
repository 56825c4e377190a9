"""Sequence to sequence: translation and summarization with a pretrained encoder."""

from __future__ import annotations

from dataclasses import asdict, replace
from textwrap import shorten
from typing import Any, ClassVar

from torch import Tensor
from tqdm import tqdm

from leanbert.data.batches.batch import IGNORED, PairBatch, PredictBatch
from leanbert.data.batches.pairs import output_frame
from leanbert.data.pairs import PairData
from leanbert.data.settings import Part
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.distributed.parallelize import gathered
from leanbert.errors import UserError
from leanbert.messages import say_once
from leanbert.models.generation import GenerationConfig, SpecialTokens, generate
from leanbert.models.kernels.loss import cross_entropy_sum
from leanbert.models.packed_inputs import PackedInputs
from leanbert.models.seq2seq import Seq2SeqModel
from leanbert.models.stored import ModelMetadata, Start, Stored
from leanbert.pretrained.build import build_model, read_model
from leanbert.ranges import COUNT, RATE, WHOLE
from leanbert.tasks.base import Answer, Task
from leanbert.tasks.metrics import ExactSums, over_ranks
from leanbert.tasks.output_metrics import Quality, bleu_signature, output_scores
from leanbert.tasks.output_tokens import BleuTokens, RougeTokens, bleu_tokenizer
from leanbert.tasks.tables import markdown_table

GENERATED_TOGETHER = 64
"""Sources of one batch of generation in evaluation."""

LONGEST_SHOWN = 240
"""Characters of a source in TensorBoard: a longer document would leave no room for what was made of it."""


class Seq2Seq(Task[PairBatch]):
    """An encoder and a decoder that writes the target, trained with the right target before each token.

    Args:
        decoder_layers: Blocks of the decoder. Default: as many as the encoder has.
        decoder_start: Where the decoder's weights come from: encoder (copies), shared (with the encoder, which saves
            parameters), random. With encoder, and nothing to start from, it is random.
        copy: Let tokens of the output be copied from the source, by an attention that is trained to point at them: for
            outputs that take over words, as in summarization. It goes with one tokenizer and without label smoothing.
        label_smoothing: Share of each target that is spread over the vocabulary. Default: 0.1, with copy 0.
        quality: What generated outputs are measured by: bleu (and chrF), or rouge.
        bleu_tokenize: Tokens of BLEU, by sacreBLEU's names; ja-mecab, ko-mecab, flores101 and flores200 need sacrebleu
            and what it asks for. auto: zh where the references are Chinese, char in other scripts without spaces
            between words, else 13a.
        rouge_tokenize: Tokens of ROUGE: auto, words of any script, or single characters where words have no spaces
            between them; ascii, as rouge-score has them, which throws all but a-z and 0-9 away; characters.
        generation: How `test` and `predict` search for outputs.
        validation_sources: Generate for so many validation sources, greedily, at each validation. Default: for all; 0:
            for none.
        settings: See `Task`.

    """

    name: ClassVar[str] = "seq2seq"
    example: ClassVar[str] = "The cook gives the guest a cake ."
    model: Seq2SeqModel
    _data: PairData

    def __init__(
        self,
        decoder_layers: int | None = None,
        decoder_start: Start = "encoder",
        copy: bool = False,
        label_smoothing: float | None = None,
        quality: Quality = "bleu",
        bleu_tokenize: BleuTokens = "auto",
        rouge_tokenize: RougeTokens = "auto",
        generation: GenerationConfig | None = None,
        validation_sources: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if label_smoothing is None:
            label_smoothing = 0.0 if copy else 0.1
        if copy and label_smoothing:
            raise UserError(
                f"model.label_smoothing: {label_smoothing} would spread a target over the vocabulary, but with "
                "model.copy it may come from the source. Leave it out"
            )
        RATE.check("model.label_smoothing", label_smoothing)
        COUNT.check("model.decoder_layers", decoder_layers)
        WHOLE.check("model.validation_sources", validation_sources)
        self.decoder_layers, self.decoder_start, self.copy = decoder_layers, decoder_start, copy
        self.label_smoothing, self.quality = label_smoothing, quality
        self.bleu_tokenize, self.rouge_tokenize = bleu_tokenize, rouge_tokenize
        self.generation = generation or GenerationConfig()
        self.validation_sources = validation_sources
        self._stored_targets = 0  # tokens that a stored decoder knows, which may be more than its tokenizer has

    def build_model(self) -> Seq2SeqModel:
        """Return the model whose vocabularies are the tokenizers'; the decoder starts as is set."""
        targets = None
        if self._data.separate:
            targets = max(self._data.target_tokenizer.vocab_size, self._stored_targets, self._start_targets())
        model: Seq2SeqModel = build_model(
            self.encoder_config,
            self._data.tokenizer.vocab_size,
            lambda config: Seq2SeqModel(config, self.decoder_layers, self.decoder_start, targets, self.copy),
            init_from=self.init_from,
        )
        return model

    def metadata(self) -> ModelMetadata:
        """Return how the decoder is made, and how outputs are searched for, besides."""
        return replace(
            super().metadata(), decoder_layers=len(self.model.decoder.blocks), decoder_start=self.decoder_start,
            target_vocab_size=self.model.target_vocab_size, copy=self.copy or None, generation=asdict(self.generation),
        )  # fmt: skip

    def _start_targets(self) -> int:
        """Return the tokens that the decoder of `init_from` knows, 0 if it has none of its own."""
        if self.init_from is None:
            return 0
        metadata = read_model(self.init_from).metadata
        return (metadata.target_vocab_size or 0) if metadata.task == self.name else 0

    def adopt(self, metadata: ModelMetadata) -> None:
        """Take over how the decoder is made."""
        self.decoder_layers = metadata.decoder_layers or self.decoder_layers
        self.decoder_start = metadata.decoder_start or self.decoder_start
        self.copy = bool(metadata.copy)
        self._stored_targets = metadata.target_vocab_size or 0

    def resume_from(self, stored: Stored, *, shrinks: bool) -> None:
        """Check `stored` and take over the vocabularies too."""
        super().resume_from(stored, shrinks=shrinks)
        if shrinks:
            self.decoder_layers = stored.metadata.decoder_layers
        self._stored_targets = stored.metadata.target_vocab_size or 0

    def check_resumable(self, stored: Stored, *, shrinks: bool = False) -> None:
        """Raise UserError if `stored` is of another task or architecture, or its decoder is made otherwise."""
        super().check_resumable(stored, shrinks=shrinks)
        metadata = stored.metadata
        start = metadata.decoder_start or self.decoder_start
        layers, known = self.decoder_layers or stored.config.num_layers, metadata.decoder_layers
        own: dict[str, tuple[object, object]] = {
            "decoder_layers": (layers, None if shrinks and (known or 0) < layers else known),
            "decoder_start": (self.decoder_start, start if "shared" in (start, self.decoder_start) else None),
            "copy": (self.copy, bool(metadata.copy)),
        }
        for setting, (value, there) in own.items():
            if there is not None and there != value:
                raise UserError(
                    f"model.{setting}: is {value}, but the checkpoint has {there}. "
                    "Give the same, or start from it with --model.init_from."
                )

    def build_metrics(self) -> None:
        """Make the sums of the loss; generated outputs are measured as a whole."""
        self.sums = ExactSums("loss", "targets")
        self._shown: list[tuple[str, str, str]] = []

    def count_targets(self, batch: PairBatch) -> Tensor:
        """Return the number of target tokens, shape []."""
        return (batch.targets != IGNORED).sum()

    def model_inputs(self, batch: PairBatch) -> tuple[PackedInputs, PackedInputs]:
        """Return the sources, and what the decoder reads."""
        return batch.inputs, batch.decoder_inputs

    def criterion(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the smoothed cross entropy in nats of scores [B, T, V], summed, shape []."""
        return cross_entropy_sum(scores, targets, self.label_smoothing)

    def loss_sum(self, batch: PairBatch) -> Tensor:
        """Return the smoothed cross entropy in nats summed over target tokens, shape []."""
        return self.model.loss_sum(batch.inputs, batch.decoder_inputs, batch.targets, self.label_smoothing)

    # ---- evaluation

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Add a batch to the loss, which is not smoothed here."""
        loss = self.model.loss_sum(batch.inputs, batch.decoder_inputs, batch.targets)
        self.sums.add(loss=loss, targets=self.count_targets(batch))

    test_step = validation_step

    def metrics_of(self, part: Part) -> dict[str, float]:
        """Return the loss, and the measures of outputs that are generated now: in validation greedily."""
        sums = self.sums.totals()
        loss = sums["loss"] / sums["targets"]
        values = {"loss": float(loss), "perplexity": float(loss.exp())}
        config, most = self.generation, None
        if part == "val":
            config = GenerationConfig(length_ratio=config.length_ratio, length_more=config.length_more)
            most = self.validation_sources
        if most != 0:
            # gathered, for each rank generates as many tokens as its outputs have
            with gathered(self.model), self.precision_of_steps():
                generated = self.generate_part(part, config, most)
            values |= output_scores(*generated, self.quality, self.bleu_tokenize, self.rouge_tokenize)
        return values

    def generate_part(
        self, part: Part, config: GenerationConfig, most: int | None
    ) -> tuple[list[str], list[list[str]]]:
        """Return the outputs for the first `most` sources of a part (None: all), and their references.

        Each rank generates for its share of the batches, and has those of all ranks.
        """
        if self.quality == "bleu" and self.bleu_tokenize != "auto":
            bleu_tokenizer(self.bleu_tokenize)  # what it lacks is said before anything is generated
        batches = self._data.sources(part, GENERATED_TOGETHER, most)
        own: list[tuple[str, list[str], str]] = []  # sources, their references and outputs
        bar = tqdm(batches, desc="Generating", unit="batch", disable=None, leave=False)
        for number, (batch, references) in enumerate(bar):
            if number % self.trainer.world_size == self.global_rank:
                answers = self._answers(batch.to(self.device), config)
                own += zip(batch.texts, references, (answer["output"] for answer in answers), strict=True)
        self._shown = [(source, right[0], output) for source, right, output in own[:12]]
        outputs, right_ones = over_ranks([row[2] for row in own]), over_ranks([row[1] for row in own])
        if part == "test" and self.quality == "bleu":
            say_once(f"BLEU is sacreBLEU's: {bleu_signature(right_ones, self.bleu_tokenize)}")
        elif part == "test":
            say_once(f"ROUGE is rouge-score's, without stemming, tokens: {self.rouge_tokenize}")
        return outputs, right_ones

    def samples(self, batch: PairBatch) -> dict[str, str]:
        """Return a table of the first generated outputs; of long sources it has the beginning."""
        if not self._shown:
            return {}
        rows = [(shorten(source, LONGEST_SHOWN, placeholder=" ..."), *answer) for source, *answer in self._shown]
        return {"samples/outputs": markdown_table(("source", "reference", "output"), rows)}

    def predict_step(self, batch: PredictBatch, batch_idx: int) -> list[Answer]:
        """Return `{"source", "output", "score"}` for each text."""
        return self._answers(batch, self.generation)

    def _answers(self, batch: PredictBatch, config: GenerationConfig) -> list[Answer]:
        return generate_texts(self.model, self._data.target_tokenizer, batch, config)


def special_tokens(tokenizer: TextTokenizer) -> SpecialTokens:
    """Return the ids that begin and end a target, and those that are not text.

    Raises:
        UserError: The tokenizer's template has no token before or after a text.
    """
    begin, end = output_frame(tokenizer, "tokenizer")
    return SpecialTokens(begin[0], end[-1], [i for i in tokenizer.special_ids if i != end[-1]])


def generate_texts(
    model: Seq2SeqModel, tokenizer: TextTokenizer, batch: PredictBatch, config: GenerationConfig
) -> list[Answer]:
    """Return `{"source", "output", "score"}` for each text; the score is log-probability over length to a power.

    `tokenizer` is the one of outputs.
    """
    found = generate(model, batch.inputs, special_tokens(tokenizer), config)
    return [
        {"source": text, "output": tokenizer.decode(output.ids).strip(), "score": round(output.score, 6)}
        for text, output in zip(batch.texts, found, strict=True)
    ]
