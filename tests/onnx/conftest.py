"""The matrix of exports: all of it on request, and what it counted."""

import onnx_compare


def pytest_addoption(parser):
    parser.addoption(
        "--full-matrix",
        action="store_true",
        help="export every config, model and level (704 cases, about 40 minutes on one core)",
    )


def pytest_terminal_summary(terminalreporter):
    for level, found in onnx_compare.SEEN.items():
        terminalreporter.write_line(f"ONNX matrix, {level}: {found}")
