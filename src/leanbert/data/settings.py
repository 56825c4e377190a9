"""The settings that all data modules have: their ranges, the files of a part, the length that is kept to."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Literal

from leanbert.data.formats.corpora import as_list, besides
from leanbert.data.samples.embedded import Sample, embedded_files
from leanbert.data.store.cache import cache_folder
from leanbert.errors import UserError
from leanbert.messages import say
from leanbert.ranges import COUNT, PART, SEED, Range, check_ranges

TooLong = Literal["truncate", "refuse"]
Part = Literal["train", "val", "test"]
PARTS: dict[Part, str] = {"train": "training", "val": "validation", "test": "test"}
"""Parts, as lines for the reader call them."""

LENGTH = Range(least=8, whole=True)
VOCABULARY = Range(least=1, most=2**31 - 1, whole=True)
RANGES = {
    "max_length": LENGTH,
    "batch_size": COUNT,
    "val_batch_size": COUNT,
    "val_share": PART,
    "vocab_size": VOCABULARY,
    "num_workers": Range(least=0, most=1024, whole=True),
    "seed": SEED,
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `UserError` for a number out of its range, and for a setting of trained tokenizers where none is."""
    check_ranges("data", settings, RANGES)
    if settings["strip_accents"] is not None and settings["tokenizer"] and settings.get("target_tokenizer") != "train":
        raise UserError(
            "data.strip_accents: it is of tokenizers that are trained, and one is given (data.tokenizer, or "
            "model.init_from). Leave it out"
        )


def rows_per_device(batch_size: int, devices: int) -> int:
    """Return how many rows of a batch each device takes. Raises `UserError` where devices cannot share it evenly."""
    if devices < 1 or batch_size % devices:
        raise UserError(
            f"data.batch_size: {batch_size} is the batch of all devices together and not divisible by {devices} "
            f"devices. Set a multiple of {max(1, devices)}"
        )
    return batch_size // devices


def given_files(settings: Mapping[str, Any], part: Part, kind: str = "files") -> list[str] | None:
    """Return the setting `PART_KIND`, for training without the files of evaluation; None: it is not set."""
    given = as_list(settings[f"{part}_{kind}"])
    if part != "train" or given is None:
        return given
    others = {f"data.{other}_{kind}": as_list(settings.get(f"{other}_{kind}")) for other in ("val", "test")}
    return besides(given, f"data.{part}_{kind}", {name: some for name, some in others.items() if some})


def files_of(settings: Mapping[str, Any], part: Part, sample: Sample) -> list[str]:
    """Return the files of a part: those that are set, of the embedded `sample`, or those that training shares.

    Raises UserError: they are not set.
    """
    given = given_files(settings, part)
    if given is not None:
        return given
    if settings["train_files"] is None:
        return [str(embedded_files(sample, cache_folder(settings["cache_dir"]))[part])]
    if part == "val":
        return given_files(settings, "train") or []
    raise UserError(f"data.{part}_files: not set. Give the files of {part} examples")


def take_over(settings: MutableMapping[str, Any], name: str, trained: object) -> None:
    """Take over the setting with which a model was `trained`, and say what it replaces."""
    if settings[name] != trained:
        say(f"data.{name}: {trained}, as the model was trained, not {settings[name]}")
        settings[name] = trained


def must_be_cut(
    settings: Mapping[str, Any], where: str, needed: int, length: int, setting: str = "data.max_length"
) -> bool:
    """Return whether an example that needs so many tokens must be cut to `length`, which the `setting` says.

    Raises UserError: it is too long, and such are refused.
    """
    if needed > length and settings["too_long"] == "refuse":
        raise UserError(
            f"{where}: {needed} tokens, but a row has {length}. Raise {setting}, or truncate (data.too_long)"
        )
    return needed > length
