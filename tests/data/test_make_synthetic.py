from __future__ import annotations

import json

import pytest

from leanbert.data.samples.synthetic import synthetic_roles, synthetic_translation
from tests.data.scripts import load_script

script = load_script("make_synthetic")


@pytest.mark.parametrize(("kind", "generator"), [("translation", synthetic_translation), ("srl", synthetic_roles)])
def test_files_hold_what_the_generator_makes(tmp_path, kind, generator):
    assert script.main([kind, str(tmp_path / "new" / "folder"), "--train", "30", "--val", "4"]) == 0
    for split, records in generator(30, 4, 200).items():
        lines = (tmp_path / "new" / "folder" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == records


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert script.main(["srl", str(tmp_path / "file"), "--train", "1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {tmp_path / 'file'}: cannot be written")
    assert message.count("\n") == 1


def test_sizes_have_limits(capsys):
    with pytest.raises(SystemExit) as error:
        script.main(["srl", "folder", "--train", "-1"])
    assert error.value.code == 2
    assert "-1 is not between 0 and 50000" in capsys.readouterr().err
