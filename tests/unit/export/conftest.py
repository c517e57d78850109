"""Groups of one for the session."""

import pytest

from bdtrain.testing import single_process_groups


@pytest.fixture(scope="session")
def groups():
    """Process groups of size 1."""
    with single_process_groups() as collection:
        yield collection
