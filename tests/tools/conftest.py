import pytest

from tests.tools.test_files import SECRET


@pytest.fixture
def folder(tmp_path):
    """A folder of files beside a secret."""
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "files").mkdir()
    return tmp_path / "files"
