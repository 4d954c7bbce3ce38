"""What the matrix of exports counted."""

import onnx_compare


def pytest_terminal_summary(terminalreporter):
    for level, found in onnx_compare.SEEN.items():
        terminalreporter.write_line(f"ONNX matrix, {level}: {found}")
