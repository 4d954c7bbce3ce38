import re
import subprocess
import sys
from pathlib import Path

import pytest

from analogfx import versions

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def having(monkeypatch):
    """Pretend that packages have versions."""

    def pretend(**found):
        monkeypatch.setattr(versions, "installed", found.get)

    return pretend


def test_a_version_is_its_first_two_numbers(monkeypatch):
    of = {"a": "2.13.0+cpu", "b": "3.7.1", "c": "2.14.0a0+git1234", "d": "nightly"}
    monkeypatch.setattr(versions, "version", of.__getitem__)
    found = [versions.installed.__wrapped__(name) for name in of]
    assert found == [(2, 13), (3, 7), (2, 14), None]


def test_what_is_not_installed_has_no_version_and_lacks_nothing():
    assert versions.installed("no-such-package-of-ours") is None
    assert not versions.there(versions.Difference("no-such-package-of-ours", (9, 9), ""))


def test_a_difference_ends_with_its_version(having):
    having(torch=(2, 11))
    assert versions.there(versions.UNBOXED)
    having(torch=(2, 12))
    assert not versions.there(versions.UNBOXED)


def test_a_torch_that_is_too_old_is_an_error(having):
    having(torch=(2, 10), triton=(3, 6))
    with pytest.raises(ImportError, match=r"torch 2\.10 is older than 2\.11"):
        versions.require()


def test_a_triton_that_is_too_old_is_a_warning_and_not_used(having):
    from analogfx.kernels import dispatch

    having(torch=(2, 11), triton=(3, 5))
    with pytest.warns(UserWarning, match=r"triton 3\.5 is older than 3\.6.*torch computes"):
        versions.require()
    if dispatch._installed():
        import torch

        assert dispatch._refused_device(torch.device("cuda")).startswith("triton 3.5 is older")


@pytest.mark.parametrize("found", [{"torch": (2, 11), "triton": (3, 6)}, {"torch": (2, 99)}])
def test_supported_versions_say_nothing(having, found):
    having(**found)
    versions.require()


def test_it_is_asked_before_anything_else_is_imported():
    # A torch that is too old lacks what other modules import.
    code = (
        "import importlib.metadata as m; m.version = lambda name: '1.0.0'\n"
        "import sys\n"
        "try:\n    import analogfx\nexcept ImportError as error:\n    print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.match(r"analogfx: torch 1\.0 is older than 2\.11.*\nFalse\n$", done.stdout), done


def test_the_package_asks_for_the_oldest_that_is_tested():
    text = ROOT.joinpath("pyproject.toml").read_text()
    oldest = ".".join(map(str, versions.OLDEST["torch"]))
    assert f'"torch>={oldest}",' in text
