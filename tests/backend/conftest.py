import pytest


@pytest.fixture(autouse=True)
def compiled_anew(fresh_dynamo):
    """Every test here compiles."""
