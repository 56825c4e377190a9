"""The program as a process of its own, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import launcher

ROOT = Path(__file__).parents[2]


def command(program, subcommand, *arguments):
    return [sys.executable, str(program), subcommand, "--config", "configs/mlm.yaml", *arguments]


def environment(**changes):
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def run(folder, *arguments, expect=0, program=launcher.__file__, **kwargs):
    result = subprocess.run(
        command(program, *arguments), cwd=folder, env=environment(), capture_output=True, text=True,
        timeout=300, **kwargs
    )  # fmt: skip
    assert result.returncode == expect, result.stderr[-3000:]
    return result


def refused(folder, *arguments, says):
    result = run(folder, *arguments, expect=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.strip().splitlines()[-1] == lines[0]
    assert "Traceback" not in result.stderr
    for text in says:
        assert text in lines[0], lines[0]
    return lines[0]
