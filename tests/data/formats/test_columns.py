from __future__ import annotations

from pathlib import Path

import pytest

from leanbert.data.formats.columns import DatasetName, dataset_records, open_dataset, split_dataset_spec
from leanbert.data.formats.corpora import records_of
from leanbert.errors import UserError
from tests.data.formats.test_readers import LFS, refused

datasets = pytest.importorskip("datasets")

CARD = """---
configs:
- config_name: small-v1
  data_files: small.jsonl
- config_name: large-v1
  data_files: large.jsonl
---
"""


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "configured"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    for name, count in (("small", 2), ("large", 4)):
        (folder / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {n}"}}\n' for n in range(count)))
    return folder


def test_names_of_data_sets(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert split_dataset_spec("hf:glue") == DatasetName("glue", "train", None)
    assert split_dataset_spec("hf:glue:test") == DatasetName("glue", "test", None)
    assert split_dataset_spec("hf:nyu/glue:mrpc:test") == DatasetName("nyu/glue", "test", "mrpc")
    assert split_dataset_spec("hf:glue:mrpc:train[10:20]+test[:5%]").split == "train[10:20]+test[:5%]"
    assert split_dataset_spec(f"hf:{tmp_path}/a:b").name == f"{tmp_path}/a:b"
    assert split_dataset_spec(f"hf:{tmp_path}/a:b:c:dev") == DatasetName(f"{tmp_path}/a:b", "dev", "c")
    with pytest.raises(UserError, match=r"^hf:a:b:c:d: too many colons\. Write hf:NAME_OR_FOLDER"):
        split_dataset_spec("hf:a:b:c:d")


def test_configurations(configured: Path) -> None:
    spec = f"hf:{configured}:small-v1:train"
    assert list(dataset_records(spec, ["text"])) == [(f"{spec}, row {n + 1}", {"text": f"small {n}"}) for n in range(2)]
    assert len(list(dataset_records(f"hf:{configured}:large-v1:train[:3]", ["text"]))) == 3
    for spec in (f"hf:{configured}", f"hf:{configured}:medium:train"):
        with pytest.raises(
            UserError, match=r"small-v1.*large-v1.*Write hf:NAME_OR_FOLDER\[:\[CONFIGURATION:\]SPLIT\]$"
        ):
            open_dataset(spec)


def test_what_datasets_found_wrong_is_said(configured: Path) -> None:
    bad = configured / "bad"
    bad.mkdir()
    (bad / "x.jsonl").write_text('{"text": "a"}x{')
    with pytest.raises(UserError, match=r"bad: cannot be loaded \(DatasetGenerationError: .* JSON parse error: "):
        open_dataset(f"hf:{bad}")


def test_columns_inside_columns(tmp_path: Path) -> None:
    rows = [
        {"t": {"en": "a", "de": None}, "t.fr": "c", "other": 1},
        {"t": {"en": "d", "de": "e"}, "t.fr": None, "other": 2},
    ]
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "x.parquet")
    dataset.with_format("numpy").save_to_disk(str(tmp_path / "set"))
    expected = [{name: row[name] for name in ("t", "t.fr")} for row in rows]
    for found in (
        records_of(str(tmp_path / "x.parquet"), ["t.en", "t.fr"]),
        dataset_records(f"hf:{tmp_path}/set", ["t.fr"], ["t.de"]),
    ):
        assert [record for _, record in found] == expected
    with pytest.raises(UserError, match=r'x\.parquet: no field "u\.en"\..* here is .*other'):
        list(records_of(str(tmp_path / "x.parquet"), ["u.en"]))


def test_what_is_no_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    assert refused(path, LFS).startswith("x.parquet: is a pointer of Git LFS, not the file itself. Run: git lfs pull")
    assert refused(path, b"text").startswith("x.parquet: not a readable parquet file after row 0 (")
    assert refused(path, b"").startswith("x.parquet: not a readable parquet file after row 0 (")
    datasets.Dataset.from_list([{"text": "a"}] * 500).to_parquet(path)
    assert refused(path, path.read_bytes()[:-40], "text").startswith(
        "x.parquet: not a readable parquet file after row 0 ("
    )
