"""A part of the zoo: what runs digitally is listed, and nothing else is refused."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import audit_zoo

CASES = {case.name: case for case in audit_zoo.cases() + audit_zoo.torch_cases()}
WHOLE = (
    "BloomForCausalLM", "CLIP", "Deberta", "JambaForCausalLM", "Lfm2ForCausalLM",
    "MambaForCausalLM", "MixtralForCausalLM", "Perceiver", "Qwen3NextForCausalLM", "T5", "WavLM",
    "Wav2Vec2Conformer", "Zamba2ForCausalLM", "nn.LSTM",
)  # fmt: skip
PARTLY = ("Funnel", "RecurrentGemmaForCausalLM")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WHOLE + PARTLY)
def test_the_report_agrees_with_what_runs(name):
    result, seen = audit_zoo.judge(CASES[name])
    assert result.verdict == "ok", result
    assert seen.products and seen.ok
    assert (result.strict == "refuses") == bool(result.digital) == (name in PARTLY)
    assert (result.measured == 1.0) == (name in WHOLE)


def test_verdicts():
    result = audit_zoo.Result("name", strict="passes")
    assert result.verdict == "ok"
    replace = audit_zoo.replace
    assert replace(result, strict="refuses").verdict == "FALSE ALARM"
    assert replace(result, strict="refuses", digital=1).verdict == "ok"
    assert replace(result, missed=("a.{0..1}.w",)).verdict == "MISSED a.{0..1}.w"
    assert replace(result, error="no").verdict == "error: no"


def test_a_model_that_does_not_run_is_an_error_and_no_verdict():
    case = audit_zoo.Case("broken", lambda: 1 / 0, {})
    result, seen = audit_zoo.judge(case)
    assert seen is None and "ZeroDivisionError" in result.verdict


def test_the_table_is_markdown():
    parts = audit_zoo.Result("A", 0.5, 0.5, strict="refuses", digital=1)
    whole = audit_zoo.Result("B", 1.0, 1.0, strict="passes")
    lines = [*audit_zoo.markdown([parts, whole])]
    assert lines[0] == "Analog as a whole, which the report says, too (1): B."
    assert lines[-1] == "| A | 0.5000 | 0.5000 | refuses | every digital product is listed |"
