"""The jobs of all these tests are quick ones."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def all_are_quick(quick_jobs):
    pass
