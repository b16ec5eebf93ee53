"""The made-up model, written once per session."""


import pytest
from made_up import bare_model

from fivefold.model import Model


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bare_model(tmp_path_factory.mktemp("bare") / "model")
