"""Every config on every model at every level: ``pytest tests/onnx/test_matrix.py --full-matrix``.

Without the option a part, in which every config, every model and every level meet.
"""

import numpy as np
import onnx
import onnx_cases as cases
import onnx_compare
import pytest
import samples
from onnx import numpy_helper

TRANSFORMERS = {
    ("gpt2", "everything", "fused"),
    ("llama", "everything, dynamic", "standard"),
    ("vit", "learned clip, discrete", "qdq"),
    ("resnet", "DAC and ADC", "explicit"),
}


def part():
    """Every config once, on the layers in turn, so that every layer has every level."""
    layers, configs = list(cases.MODELS), list(samples.CONFIGS)
    for case in cases.matrix():
        c = configs.index(case.config)
        own = layers[c % 4], cases.LEVELS[(c // 4 + c % 4) % 4]
        if (case.model, case.level) == own or case[:3] in TRANSFORMERS:
            yield case


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("--full-matrix")
    chosen = cases.matrix() if full else list(part())
    metafunc.parametrize("case", chosen, ids=lambda case: "-".join(map(str, case)))


@pytest.mark.filterwarnings('ignore:level="qdq", but no site')
def test_a_file_gives_what_the_model_gives_but_at_ties(case, tmp_path, request):
    full = request.config.getoption("--full-matrix")
    found = case.check(tmp_path, verify=full)
    onnx_compare.SEEN[case.level] = onnx_compare.SEEN.get(case.level, onnx_compare.Found()) + found
    assert found.values > 0


def test_the_comparison_sees_a_wrong_range(tmp_path):
    x = cases.example("linear")
    analog = cases.analog(cases.mlp, samples.CONFIGS["DAC and ADC"], x)
    path = tmp_path / "model.onnx"
    cases.export_onnx(analog, (x,), path)
    model = onnx.load(path)
    (site, _) = onnx_compare.metadata(path)["sites"]
    name = site["initializers"]["input_range"]
    (held,) = [t for t in model.graph.initializer if t.name == name]
    held.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held) * np.float32(1.001), name))
    onnx.save(model, path)
    with pytest.raises(AssertionError, match="the model is outside at 0"):
        onnx_compare.compare(path, analog, [x])
