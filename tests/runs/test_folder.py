"""The folder of a run: one run at a time, whole files, checkpoints that run no code and show
damage.
"""

import contextlib
import errno
import json
import os
import pickle
import re
import resource
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from evaluate import positions_of
from reagent import run
from reagent.engines import EngineConfig, make_engine
from reagent.folder import claim, read_json, write_whole
from reagent.policy import load_policy, load_tokenizer, shard
from results.journal import Journal
from tests.helpers.tiny import ROOT, tiny_model


def test_a_second_process_is_refused_by_name_until_the_first_ends(tmp_path):
    code = "import sys; from reagent.folder import claim; claim(sys.argv[1])"
    second = [sys.executable, "-c", code, str(tmp_path / "out")]
    first = claim(tmp_path / "out")
    told = subprocess.run(second, capture_output=True, text=True, cwd=ROOT)
    assert told.returncode == 1 and f"is being written by process {os.getpid()}" in told.stderr
    assert "Traceback" not in told.stderr
    first.close()
    assert subprocess.run(second, cwd=ROOT).returncode == 0


def test_a_lock_that_is_no_text_or_another_hosts_is_one_all_the_same(tmp_path):
    (tmp_path / "lock-0").write_bytes(b"\xff\xfeprocess 1 on another host")
    first = claim(tmp_path)  # its holder is gone: nobody has it locked
    (tmp_path / "lock-0").write_bytes(b"\xff\xfe")
    for reads in (False, True):
        with pytest.raises(SystemExit, match="is being written by"):
            claim(tmp_path, 0, reads)
    first.close()


def test_a_folder_that_cannot_be_one_is_told_in_a_sentence(tmp_path):
    (tmp_path / "out").write_text("a file")
    for folder in (tmp_path / "out", tmp_path / "out" / "inside"):
        with pytest.raises(SystemExit, match="out_dir .*out.* cannot be written"):
            claim(folder)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_whole(path, "older")
    os.link(path, tmp_path / "kept")  # a file in another's hand is not written into
    write_whole(path, "old")
    assert path.read_text() == "old" and (tmp_path / "kept").read_text() == "older"

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="run.json cannot be written: No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"


@contextlib.contextmanager
def disk_of(bytes_left: int):
    """Files of this process grow to this size and no further, as on a disk that fills up."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_is_told_in_a_sentence_and_the_run_goes_on_from_what_was_whole(tmp_path):
    with disk_of(4), pytest.raises(SystemExit, match="out_dir .* cannot be written"):
        claim(tmp_path)
    named = dict(dataset="d", rollout=0, row="0", fault="x")
    journal = Journal(tmp_path)
    journal.append(named | {"id": "first"})
    whole = journal.path.read_bytes()
    with disk_of(len(whole) + 100), pytest.raises(SystemExit, match="journal-0.jsonl cannot be"):
        journal.append(named | {"id": "x" * 1000})
    assert journal.path.stat().st_size == len(whole) + 100  # torn
    journal.close()
    again = Journal(tmp_path)
    again.append(named | {"id": "second"})
    assert [key[1] for key in again.faults] == ["first", "second"]
    again.close()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EXDEV, errno.EDQUOT])
def test_a_file_that_cannot_be_flushed_or_renamed_leaves_the_old_one(
    tmp_path, monkeypatch, call, number
):
    path = tmp_path / "run.json"
    write_whole(path, "old")

    def fails(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(SystemExit, match=f"run.json cannot be written: {os.strerror(number)}"):
            write_whole(path, "new")
    assert path.read_text() == "old"
    write_whole(path, ("ne", "w"))
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "it is empty"),
        ('{"step": 1, ', "JSONDecodeError"),
        ("\0" * 100, "JSONDecodeError"),
        ("[1]", "it lacks step"),
        ("3", "TypeError"),
        ("{}", "it lacks step"),
        ("[" * 100_000, "RecursionError"),
    ],
    ids=range(7),
)
def test_a_file_that_decides_how_a_run_goes_on_is_told_in_a_sentence(tmp_path, text, told):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(SystemExit, match=f"run.json cannot be read .*{told}"):
        read_json(tmp_path / "run.json", "step")


# models and checkpoints: what is read of them is data

CODE = "open({!r}, 'w')\nfrom transformers import *\nclass Own{}: pass\n"
LOADERS = {
    "tokenizer": load_tokenizer,
    "policy": lambda folder: load_policy(folder, False),
    "positions": positions_of,
    "hf": lambda folder: make_engine(EngineConfig(kind="hf"), folder, [1], max_context=64),
    "vllm": lambda folder: make_engine(EngineConfig(kind="vllm"), folder, [1], max_context=64),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", ["qwen3", "unknown"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_code_is_refused_and_nobody_is_asked(
    tmp_path, monkeypatch, loader, kind, file
):
    folder, asked = tiny_model(tmp_path / "model"), []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    (tmp_path / "model" / "own.py").write_text(CODE.format(str(tmp_path / "ran"), "Config"))
    path = tmp_path / "model" / file
    names = {"AutoConfig": "own.OwnConfig", "AutoTokenizer": ["own.OwnConfig", None]}
    said = json.loads(path.read_text()) | {"auto_map": names}
    path.write_text(json.dumps(said | ({"model_type": kind} if file == "config.json" else {})))
    with pytest.raises(SystemExit, match="names code of its own"):
        LOADERS[loader](folder)
    assert not asked and not (tmp_path / "ran").exists()


PARTS = "processor_config preprocessor_config video_preprocessor_config generation_config"


@pytest.mark.parametrize("part", PARTS.split())
def test_code_that_any_part_of_a_model_folder_names_is_refused(tmp_path, part):
    folder = tiny_model(tmp_path / "model")
    names = {"AutoProcessor": "own.Own", "AutoImageProcessor": "own.Own"}
    (tmp_path / "model" / f"{part}.json").write_text(json.dumps({"auto_map": names}))
    for loader in (load_tokenizer, LOADERS["vllm"]):
        with pytest.raises(SystemExit, match=f"{part}.json names code of its own"):
            loader(folder)


class Evil:
    """Pickled, it leaves a file where it is read by a pickle that runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tiny_model(folder / "model")
    run.init_distributed(60.0)
    policy = shard(load_policy(str(folder / "model"), False), torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters())
    return policy, optimizer, load_tokenizer(str(folder / "model"))


@pytest.fixture
def saved(trained, tmp_path):
    return run.save_checkpoint(tmp_path, 1, *trained, {}, meet)


def meet(phase, error=None):
    if error:
        raise SystemExit(f"{phase}: {error}")


def load(saved, trained):
    return run.load_checkpoint(saved, *trained[:2], meet)


def resealed(path, body):
    path.write_bytes(body)
    run.write_digest(path)


@pytest.mark.parametrize("inside", [False, True])
def test_the_index_of_a_checkpoint_runs_no_code(saved, trained, tmp_path, inside):
    index = run.state_of(saved) / ".metadata"
    plant = Evil(tmp_path / "ran")
    if inside:  # a real index that carries it
        plant, whole = pickle.loads(index.read_bytes()), plant
        plant.planner_data["model.extra"] = whole
    resealed(index, pickle.dumps(plant))
    with pytest.raises(SystemExit, match="not a checkpoint of this trainer .*names io.open"):
        load(saved, trained)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "names", ["os system", "builtins eval", "torch load", "torch Size.__class__", "pathlib Path"]
)
def test_an_index_names_nothing_but_its_records(saved, trained, names):
    module, name = names.split()
    body = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)
    )
    resealed(run.state_of(saved) / ".metadata", body + b"\x93.")
    with pytest.raises(SystemExit, match=re.escape(f"names {module}.{name}")):
        load(saved, trained)


@pytest.mark.parametrize("body", [b"", b"\x80", pickle.dumps({}), pickle.dumps(None), b"no pickle"])
def test_an_index_that_is_none_is_told_in_a_sentence(saved, trained, body):
    resealed(run.state_of(saved) / ".metadata", body)
    with pytest.raises(SystemExit, match="not a checkpoint of this trainer"):
        load(saved, trained)


def test_a_shard_outside_the_checkpoint_is_refused(saved, trained):
    path = run.state_of(saved) / ".metadata"
    index = pickle.loads(path.read_bytes())
    next(iter(index.storage_data.values())).relative_path = "../../other.distcp"
    resealed(path, pickle.dumps(index))
    with pytest.raises(SystemExit, match="names the file '../../other.distcp'"):
        load(saved, trained)


def test_numbers_of_the_optimizer_run_no_code(saved, trained, tmp_path):
    shard_path, path = run.state_of(saved) / "__0_0.distcp", run.state_of(saved) / ".metadata"
    index = pickle.loads(path.read_bytes())
    key = next(k for k in index.storage_data if k.fqn == "optimizer.param_groups.0.lr")
    torch.save(Evil(tmp_path / "ran"), tmp_path / "evil")
    body, evil = shard_path.read_bytes(), (tmp_path / "evil").read_bytes()
    index.storage_data[key].offset, index.storage_data[key].length = len(body), len(evil)
    resealed(shard_path, body + evil)
    resealed(path, pickle.dumps(index))
    with pytest.raises(SystemExit, match="Weights only load failed"):
        load(saved, trained)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_one_flipped_bit_of_a_checkpoint_is_found(saved, trained, name, share):
    path = run.state_of(saved) / name
    body = bytearray(path.read_bytes())
    body[int(share * len(body))] ^= 1
    path.write_bytes(body)
    with pytest.raises(SystemExit, match=f"{name} is damaged"):
        load(saved, trained)


def test_one_flipped_bit_of_the_weights_is_found_where_a_stage_begins_with_them(saved):
    load_policy(str(saved), False)
    body = bytearray((saved / "model.safetensors").read_bytes())
    body[-1] ^= 128
    (saved / "model.safetensors").write_bytes(body)
    with pytest.raises(SystemExit, match="model.safetensors is damaged"):
        load_policy(str(saved), False)


def test_a_checkpoint_without_its_digest_is_told(saved, trained):
    (run.state_of(saved) / "__0_0.distcp.sha256").unlink()
    with pytest.raises(SystemExit, match="__0_0.distcp cannot be checked"):
        load(saved, trained)


def test_digests_are_those_of_sha256sum(saved):
    for folder in (saved, run.state_of(saved)):
        names = [path.name for path in folder.glob("*.sha256")]
        names += [path.name for path in folder.glob(".*.sha256")]
        done = subprocess.run(["sha256sum", "--check", *names], cwd=folder, capture_output=True)
        assert done.returncode == 0 and names


def test_a_rank_that_failed_shows_the_place_and_all_are_told(trained, capsys):
    def of_a_forker():
        raise KeyError("reward")

    try:
        of_a_forker()
    except KeyError as error:
        with pytest.raises(SystemExit, match="the rollout failed on rank 0: KeyError: 'reward'"):
            run.meet("the rollout", dist.new_group(backend="gloo"), 10.0, error)
    shown = capsys.readouterr().err
    assert "test_folder.py" in shown and "of_a_forker" in shown and "line" in shown
