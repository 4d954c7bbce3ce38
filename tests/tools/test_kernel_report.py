import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import kernel_report  # noqa: E402
from kernel_report import Report  # noqa: E402

GOOD = Report(registers=128, spilled=0, shared=96 << 10, matrix={"HGMMA": 4}, approximate=0)
BLOCKS = {"BLOCK_ROWS": 128, "BLOCK_OUT": 64, "BLOCK_IN": 64, "GROUP": 8}


def kernel(dtype="bf16", matrix=True, num_warps=8, **constants):
    return SimpleNamespace(
        name=f"product[{dtype}]",
        dtype=dtype,
        matrix=matrix,
        options={"num_warps": num_warps},
        constants=BLOCKS | constants,
    )


# ------------------------------------------------------------------------------------ reading


DUMP = """
Resource usage:
 Common:
  GLOBAL:0
 Function linear_forward:
  REG:237 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:616 TEXTURE:0 SURFACE:0 SAMPLER:0
        Function : linear_forward
        /*0000*/                   LDC R1, c[0x0][0x28] ;         /* 0x00000a00ff017b82 */
        /*0a10*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT ;
        /*0a20*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0a30*/             @!UP1 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*10a40*/                  FFMA R1, R2, R3, R4 ;          /* HMMA, in a comment */
"""


def test_resources_and_matrix_instructions_are_read():
    assert kernel_report.resources(DUMP) == {"registers": 237, "spilled": 16}
    assert kernel_report.matrix_instructions(DUMP) == {"HGMMA": 1, "HMMA": 2}
    with pytest.raises(RuntimeError, match="no resource usage"):
        kernel_report.resources("nothing")


def test_only_divisions_that_are_not_rounded_are_counted():
    ptx = "div.full.f32 %r1; div.rn.f32 %r2; div.approx.ftz.f32 %r3; div.s32 %r4;"
    assert kernel_report.approximate_divisions(ptx) == 2


# ---------------------------------------------------------------------------------- judgement


@pytest.mark.parametrize(
    ("arch", "changes", "reason"),
    [
        (90, {"spilled": 8}, "spills 8 bytes"),
        (80, {"shared": (163 << 10) + 1}, "needs 166913 bytes of shared memory, sm_80 has 166912"),
        (90, {"shared": (227 << 10) + 1}, "needs 232449 bytes of shared memory, sm_90 has 232448"),
        (90, {"matrix": {"HMMA": 64}}, "a bf16 product without HGMMA or IGMMA"),
        (80, {"matrix": {}}, "a bf16 product without HMMA or IMMA or HGMMA or IGMMA"),
        (90, {"serialised": True}, "its warpgroup products wait for one another (ptxas C7515)"),
    ],
)
def test_a_problem_names_kernel_arch_and_reason(arch, changes, reason):
    report = GOOD._replace(**changes)
    assert kernel_report.problems(kernel(), arch, report) == [f"product[bf16], sm_{arch}: {reason}"]


@pytest.mark.parametrize(
    ("found", "arch", "instructions"),
    [
        (kernel(), 90, {"HGMMA": 4}),
        (kernel("int8"), 90, {"IGMMA": 4}),
        (kernel("int8"), 80, {"IMMA": 64}),
        (kernel(), 80, {"HMMA": 64}),
        (kernel(BLOCK_ROWS=16), 90, {"HMMA": 16}),  # too small for a warpgroup
        (kernel("tf32"), 90, {"HMMA": 64}),
        (kernel("fp32", matrix=False), 90, {}),
    ],
)
def test_what_is_as_wanted_is_no_problem(found, arch, instructions):
    assert kernel_report.problems(found, arch, GOOD._replace(matrix=instructions)) == []


def test_a_table_has_a_line_for_every_job():
    jobs = [(kernel(), 80), (kernel("int8"), 90)]
    reports = kernel_report.examine_all(jobs, 2, lambda k, arch: GOOD._replace(registers=arch))
    header, *lines = kernel_report.table(jobs, reports).splitlines()
    assert header.split()[:3] == ["kernel", "arch", "registers"]
    assert [line.split()[:3] for line in lines] == [
        ["product[bf16]", "sm_80", "80"],
        ["product[int8]", "sm_90", "90"],
    ]


# -------------------------------------------------------------------------------- compilation


SCRATCH = """
import sys
sys.path.insert(0, {tools!r})
import kernel_report, triton, triton.language as tl
from types import SimpleNamespace

@triton.jit
def product(p_a, p_b, p_c, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    deep = tl.arange(0, 64)
    a = tl.load(p_a + row * 64 + deep[None, :])
    b = tl.load(p_b + deep[:, None] * WIDTH + column)
    c = tl.dot(a, b)
    tl.store(p_c + row * WIDTH + column, c / tl.sum(c, axis=1)[:, None])

def job(block, width, warps):
    return SimpleNamespace(
        name="product", kernel=product, dtype="bf16", matrix=True,
        options={{"num_warps": warps, "num_stages": 1}},
        signature=dict(p_a="*bf16", p_b="*bf16", p_c="*fp32", BLOCK="constexpr", WIDTH="constexpr"),
        constants=dict(BLOCK=block, WIDTH=width, BLOCK_ROWS=block),
        attrs={{(i,): [["tt.divisibility", 16]] for i in range(3)}},
    )

def compiled(*shape):
    made = job(*shape)
    made.constants.pop("BLOCK_ROWS")
    return kernel_report.examine(made, 90)

small, large = compiled(64, 64, 4), compiled(128, 256, 4)
print(small.matrix, small.spilled, small.approximate > 0, large.spilled > 0)
kernel_report.compiled = None  # what is asked for again comes from the cache
assert compiled(64, 64, 4) == small
"""


def without_interpreter(cache, *command):
    """Run a command that compiles, whatever this process does with kernels."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def test_compilation_finds_tensor_cores_and_spills(tmp_path):
    script = tmp_path / "scratch.py"  # triton reads a kernel's source from its file
    script.write_text(SCRATCH.format(tools=str(ROOT / "tools")))
    done = without_interpreter(tmp_path / "cache", str(script))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\{'HGMMA': \d+\} 0 True True\n", done.stdout)


def test_the_command_reports_a_shipped_kernel(tmp_path):
    options = ["--only", "row_max[bf16]", "--arch", "90"]
    done = without_interpreter(tmp_path, "tools/kernel_report.py", *options)
    assert done.returncode == 0, done.stderr
    _header, line = done.stdout.splitlines()
    assert line.split()[:2] == ["row_max[bf16]", "sm_90"]
    done = without_interpreter(tmp_path, "tools/kernel_report.py", *options, "--check")
    assert (done.returncode, done.stdout) == (0, "1 compiled, 0 not as wanted\n")


def test_the_check_fails_with_the_reasons(monkeypatch, capsys):
    spilling = GOOD._replace(spilled=24)
    monkeypatch.setattr(kernel_report, "chosen_kernels", lambda only: [kernel()])
    monkeypatch.setattr(kernel_report, "examine_all", lambda jobs, workers: [spilling, GOOD])
    assert kernel_report.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "product[bf16], sm_80: spills 24 bytes",
        "2 compiled, 1 not as wanted",
    ]


# ------------------------------------------------------------------------------------ refusals


def test_without_triton_the_command_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(SystemExit, match="needs triton, which is for Linux"):
        kernel_report.main([])


def test_the_interpreter_compiles_nothing(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        kernel_report.main([])


# -------------------------------------------------------------------------------------- paper


def test_the_page_shows_the_paper_model():
    page = kernel_report.PAGE.read_text()
    text = kernel_report.paper_table()
    assert kernel_report.with_section(page, kernel_report.COMMAND, text) == page
