"""Scenes that the tests of this folder share."""

import pytest
from scenes import write_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder)
    return folder
