"""What the tests of reading share."""

import pytest

from favor_np.forecast import read_prices


@pytest.fixture
def read(tmp_path):
    def read(text, **options):
        path = tmp_path / "prices.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_prices(path, **options)

    return read
