"""One fork server and one set of drawn videos for all tests of this folder."""

import pytest

from tests.reliability.harness import Lab, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("cache"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def unbroken():
    """Rows of runs that nothing befell, by their overrides."""
    return {}


@pytest.fixture
def lab(server, tmp_path, unbroken):
    lab = Lab(server, tmp_path, unbroken)
    yield lab
    lab.close()
