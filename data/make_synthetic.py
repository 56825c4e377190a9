"""Write the synthetic data sets that LeanBERT's configs run on without files, to look at them or to change them.

    python data/make_synthetic.py translation samples/translation
    python train.py fit --config configs/translation.yaml --data.train_files samples/translation/train.jsonl

Both sets are drawn from grammars by a seed: they are made up, and no figure on them says anything about a language.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path

from leanbert.data.samples.synthetic import SPLITS, synthetic_roles, synthetic_translation
from leanbert.errors import UserError
from leanbert.files import write_text_atomically

GENERATORS = {"translation": synthetic_translation, "srl": synthetic_roles}
SIZES = {
    kind: {split: inspect.signature(generator).parameters[split].default for split in SPLITS}
    for kind, generator in GENERATORS.items()
}


def main(arguments: list[str] | None = None) -> int:
    """Write `FOLDER/train.jsonl`, `val.jsonl` and `test.jsonl`; return the exit status, 2 where that is impossible."""
    given = _parser().parse_args(arguments)
    sizes = {split: size for split in SPLITS if (size := getattr(given, split)) is not None}
    splits = GENERATORS[given.kind](**sizes, seed=given.seed)
    try:
        for split, records in splits.items():
            path = given.folder / f"{split}.jsonl"
            write_text_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
            print(f"{path}: {len(records):,} records", file=sys.stderr)
    except (UserError, OSError) as error:
        print(f"error: {given.folder}: cannot be written. Choose another folder ({error})", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(GENERATORS), help='translation: {"source", "target"}; '
                        'srl: {"tokens", "predicate", "labels"}, one record for each predicate')  # fmt: skip
    parser.add_argument("folder", type=Path, help="where the three files go; made if it is not there")
    for split in SPLITS:
        default = " and ".join(f"{kind} {SIZES[kind][split]}" for kind in SIZES)
        parser.add_argument(f"--{split}", type=_size, help=f"records (srl: at least so many); default: {default}")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other sentences; default 0")
    return parser


def _size(text: str) -> int:
    size = int(text)
    if not 0 <= size <= 50_000:  # the grammars have no end, but sentences become alike
        raise argparse.ArgumentTypeError(f"{size} is not between 0 and 50000")
    return size


if __name__ == "__main__":
    sys.exit(main())
