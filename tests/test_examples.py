"""The examples of the documentation that several processes run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMAND = re.compile(r"```bash\ntorchrun (.*train_llama.*)\n```\n\n```\n((?:.*\n)+?)```")


def losses(table):
    """The curves of a table that the example printed, by name."""
    head, *rows = [re.split(r"  +", line.strip()) for line in table.strip().splitlines()]
    columns = zip(*(map(float, row[1:]) for row in rows), strict=True)
    return dict(zip(head[1:], columns, strict=True))


def test_a_llama_trains_alike_in_every_way(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    pages = [ROOT / "README.md", ROOT / "docs" / "distributed.md"]
    (said, shown), (_, shown_too) = [COMMAND.search(page.read_text()).groups() for page in pages]
    *options, script, flag, picture = said.split()
    assert flag == "--picture"
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         *options, str(ROOT / script), flag, picture],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    curves = losses(run.stdout)
    alone = curves["one process"]
    assert list(curves) == ["one process", "DDP", "FSDP2", "TP"] and len(alone) == 10
    assert alone[-1] < alone[0] - 0.5
    for name, curve in curves.items():  # transformers computes RMSNorm and the loss in float32
        assert curve == pytest.approx(alone, rel=1e-6), name
    for table in (shown, shown_too):
        for name, curve in losses(table).items():
            assert curve == pytest.approx(curves[name][: len(curve)], rel=1e-5), name
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
