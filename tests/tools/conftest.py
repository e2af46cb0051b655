import shutil
import subprocess

import pytest

from tests.tools.test_files import SECRET


@pytest.fixture
def folder(tmp_path):
    """A folder of files beside a secret."""
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext "
        "subjectAltName=DNS:good.example"
    )
    command = [*command.split(), "-keyout", str(folder / "key"), "-out", str(folder / "cert")]
    subprocess.run(command, check=True, capture_output=True)
    return folder
