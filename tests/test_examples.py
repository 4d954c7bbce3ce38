"""The examples of the documentation that several processes run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def test_a_llama_trains_alike_in_every_way():
    pytest.importorskip("transformers")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [sys.executable, *launch, str(EXAMPLES / "train_llama.py")],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = [line.split() for line in run.stdout.splitlines() if re.match(r" *\d+ +\d", line)]
    curves = list(zip(*(map(float, row[1:]) for row in rows), strict=True))
    assert len(curves) == 4 and len(rows) == 10
    assert curves[0][-1] < curves[0][0] - 0.5
    for curve in curves[1:]:  # RMSNorm computes in float32
        assert curve == pytest.approx(curves[0], rel=1e-6)
