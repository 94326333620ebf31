"""What is served, for all tests of it."""

import pytest


@pytest.fixture(scope="session")
def server(shop):
    """The shop at work, for tests that leave it as it was."""
    from serving import serving  # skips where the packages of the extra are not there

    with serving(shop, shop) as served:
        yield served
        assert served.said == []
