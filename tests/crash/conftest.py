"""One server of forked processes and one tiny world for the folder's tests."""
import pytest
from test_processes import Jobs, tiny_world


@pytest.fixture(scope="module")
def jobs():
    found = Jobs()
    yield found
    found.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))
