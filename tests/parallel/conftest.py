"""Ranks end with the module that used them."""

import pytest
from worker_pool import close_pools


@pytest.fixture(scope="module", autouse=True)
def _ranks_end():
    yield
    close_pools()
