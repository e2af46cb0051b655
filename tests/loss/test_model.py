"""Packing, log-probs, gradients and checkpoints, against transformers and plain PyTorch."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from grpo_unified import grpo_loss
from reagent import policy, run
from reagent.policy import (
    ChunkedHead,
    Sequence,
    _ChunkedLogprobs,
    backward,
    balance,
    collate,
    each_microbatch,
    load_policy,
    load_tokenizer,
    make_optimizer,
    shard,
)
from tests.helpers.tiny import ROOT, random_rows, tiny_model

COLUMNS = ("advantage", "weight", "sampler_logps")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("untied"), tied=False)


def policy_of(folder, checkpoint_activations=False):
    run.init_distributed(60)
    return shard(load_policy(folder, checkpoint_activations), CPU)


def gradients(policy, microbatches):
    """Gradient of the GRPO loss over micro-batches, by parameter name."""
    policy.zero_grad()
    total = 0.0
    for rows in microbatches:
        batch = collate(rows, COLUMNS, CPU)
        logps, _ = policy(batch, 0.7)
        c = batch.columns
        loss, *_ = grpo_loss(
            logps, logps.detach() + 0.1 * c["sampler_logps"], c["advantage"], c["weight"], 0.2, 0.34
        )
        backward(loss)
        total += loss.item()
    return total, {n: p.grad.full_tensor().clone() for n, p in policy.named_parameters()}


def assert_same(a, b, tolerance=1e-5):
    assert abs(a[0] - b[0]) < tolerance
    for name in a[1]:
        assert torch.allclose(a[1][name], b[1][name], atol=tolerance), name


@pytest.mark.parametrize("which", ["folder", "untied"])
def test_packed_logps_equal_those_of_single_rows_in_transformers(which, request):
    folder, rows = request.getfixturevalue(which), random_rows([7, 19, 19, 3])
    got, entropy = policy_of(folder)(collate(rows, (), CPU), 0.7)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected, expected_entropy = [], []
    for row in rows:
        logits = plain(torch.tensor([row.ids])).logits[0] / 0.7
        logps = F.log_softmax(logits[:-1], -1)
        keep = torch.tensor(row.mask[1:], dtype=torch.bool)
        expected.append(logps.gather(1, torch.tensor(row.ids[1:])[:, None])[keep, 0])
        expected_entropy.append(-(logps.exp() * logps).sum(-1)[keep])
    assert torch.allclose(got, torch.cat(expected), atol=1e-5)
    assert torch.allclose(entropy, torch.cat(expected_entropy), atol=1e-4)


@pytest.mark.parametrize("kept", [399, 400])  # numbers; the softmax of the 10 tokens has 400
def test_the_chunked_head_has_the_gradient_of_full_logits(kept, monkeypatch):
    monkeypatch.setattr("reagent.policy.HEAD_CHUNK", {"cpu": 3})
    monkeypatch.setattr("reagent.policy.HEAD_KEPT", kept)
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    targets, scale = torch.randint(40, (10,)), torch.randn(10)
    logps, entropy = ChunkedHead(weight)(hidden, targets, 0.7)
    got = torch.autograd.grad((scale * logps).sum(), (hidden, weight), retain_graph=True)
    again = torch.autograd.grad((scale * logps).sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, again))  # what is kept stays as it is
    full = F.log_softmax(hidden @ weight.t() / 0.7, -1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((scale * full).sum(), (hidden, weight))
    each = F.log_softmax(hidden @ weight.t() / 0.7, -1)
    assert torch.allclose(logps, full, atol=1e-5)
    assert torch.allclose(entropy, -(each.exp() * each).sum(-1), atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected))


def test_the_chunked_head_sums_the_gradient_of_its_chunks_in_bf16_too(monkeypatch):
    monkeypatch.setattr("reagent.policy.HEAD_CHUNK", {"cpu": 3})
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 8), torch.randn(40, 8)
    targets, scale = torch.randint(40, (10,)), torch.randn(10)
    got = []
    for dtype in (torch.float32, torch.bfloat16):
        sides = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        logps, _ = _ChunkedLogprobs.apply(*sides, targets, 0.7)
        got.append([g.float() for g in torch.autograd.grad((scale * logps).sum(), sides)])
    for exact, rounded in zip(*got):
        assert (exact - rounded).norm() < 0.02 * exact.norm()


def test_the_microbatch_split_does_not_change_the_gradient(folder):
    rows, policy = random_rows([9, 4, 16, 16, 5]), policy_of(folder)
    assert_same(gradients(policy, [rows]), gradients(policy, [rows[:1], rows[1:4], [], rows[4:]]))


def test_activation_checkpointing_does_not_change_the_gradient(folder):
    rows = random_rows([9, 4, 16])
    assert_same(gradients(policy_of(folder), [rows]), gradients(policy_of(folder, True), [rows]))


def test_a_chain_in_one_row_equals_two_separate_rows(folder):
    (chain,) = random_rows([30])
    first = sum(chain.mask[:12])
    alone = Sequence(
        chain.ids[:12], chain.mask[:12], {k: v[:first] for k, v in chain.columns.items()}
    )
    second = Sequence(
        chain.ids, [0] * 12 + chain.mask[12:], {k: v[first:] for k, v in chain.columns.items()}
    )
    policy = policy_of(folder)
    assert_same(gradients(policy, [[chain]]), gradients(policy, [[alone, second]]))


def test_balance_deals_every_row_once_in_equally_many_microbatches():
    rows = random_rows([50, 3, 17, 90, 20, 41, 8, 8, 8])
    dealt = balance(rows, 3, 60)
    assert len({len(part) for part in dealt}) == 1
    flat = [id(row) for part in dealt for microbatch in part for row in microbatch]
    assert sorted(flat) == sorted(map(id, rows))
    assert all(sum(len(r.ids) for r in mb) <= 60 or len(mb) == 1 for part in dealt for mb in part)


def test_balance_gives_ranks_equal_work():
    dealt = balance(random_rows([50, 3, 17, 90, 20, 41, 8, 8, 8]), 3, 60)
    work = [sum(len(row.ids) for mb in part for row in mb) for part in dealt]
    assert sorted(work) == [77, 78, 90]  # 245 in all; one row alone has 90


TWO_RANKS = """
import json, sys, torch
sys.path[:0] = [{root!r}]
from reagent import run
from reagent.policy import full_weights, load_policy, load_tokenizer, shard
from reagent.policy import Sequence, _ChunkedLogprobs, backward, balance, collate
from tests.loss.test_model import gradients
from tests.helpers.tiny import random_rows
rank, world, device = run.init_distributed(60)
policy = shard(load_policy({folder!r}, False), device)
rows = random_rows([9, 4, 16, 30, 5])
mine = balance(rows, world, 32)[rank]
loss, grads = gradients(policy, mine)
total = run.sum_over_ranks([loss])[0]
names = [name for name, _ in full_weights(policy, torch.float32)]
if rank == 0:
    torch.save((total, grads, names), {out!r})
torch.distributed.barrier()  # gloo aborts where a peer leaves in mid-send
del policy
"""


def launcher(ranks):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        "--master_port=0",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
    ]


def torchrun(script, *args, ranks=2, timeout=240):
    command = [*launcher(ranks), str(script), *args]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=os.environ
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_two_ranks_with_unequal_rows_have_the_gradient_of_one(folder, tmp_path):
    script, out = tmp_path / "two.py", tmp_path / "two.pt"
    script.write_text(TWO_RANKS.format(root=str(ROOT), folder=folder, out=str(out)))
    torchrun(script)
    total, grads, names = torch.load(out)
    assert_same((total, grads), gradients(policy_of(folder), [random_rows([9, 4, 16, 30, 5])]))
    assert "lm_head.weight" in names  # tied, and yet yielded: the sampler's head would go stale


ENDS = """
import atexit, os, sys
sys.path[:0] = [{root!r}]
def threads():
    tasks = "/proc/self/task"
    return [open(f"{{tasks}}/{{task}}/comm").read().strip() for task in os.listdir(tasks)]
atexit.register(lambda: print("at the end:", threads()))  # before run's own, so called after it
from reagent import run
from reagent.policy import load_policy, shard
def main():
    device = run.init_distributed(60)[2]
    policy = shard(load_policy({folder!r}, False), device)
    run.sum_over_ranks([1.0])
    print("in the run:", threads())
    run.dist.destroy_process_group()
main()
"""


def test_no_thread_of_gloo_is_left_when_python_shuts_down(folder, tmp_path):
    """One that then let go of a tensor would abort the process, although its run is done."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS.format(root=str(ROOT), folder=folder))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    during, after = done.stdout.splitlines()
    assert "gloo" in during and "gloo" not in after


HSDP = """
import sys, torch
sys.path[:0] = [{root!r}]
import torch.distributed as dist
import sft
from reagent import run
from reagent.policy import PolicyConfig, load_policy, make_optimizer, shard
from tests.helpers.tiny import random_rows
class Two:
    rank, world, device = run.init_distributed(60)
    sum = staticmethod(run.sum_over_ranks)
policy = shard(load_policy({folder!r}, False), Two.device, shard_ranks=1)
optimizer, reduced, plain = make_optimizer(policy, lr=0.0, weight_decay=0.0), [], dist.all_reduce
def noted(tensor, *args, **options):
    reduced.append(tensor.numel())
    return plain(tensor, *args, **options)
dist.all_reduce = noted
kept, seen = [], []
def keep():
    kept.append({{n: p.grad.full_tensor() for n, p in policy.named_parameters()}})
optimizer.step = keep
cfg = sft.Config(policy=PolicyConfig(tokens_per_microbatch=16), max_grad_norm=1e9)
sft.update(policy, optimizer, random_rows([9, 4, 16, 11, 5]), cfg, Two)
if Two.rank == 0:
    torch.save((kept[0], [n for n in reduced if n > 100]), {out!r})
dist.barrier()
del policy
"""


def test_replicas_add_their_gradients_once_a_step(folder, tmp_path):
    script, out = tmp_path / "hsdp.py", tmp_path / "hsdp.pt"
    script.write_text(HSDP.format(root=str(ROOT), folder=folder, out=str(out)))
    torchrun(script)
    got, reduced = torch.load(out)
    assert len(reduced) == 3  # two blocks and the root, not once more a micro-batch
    rows, policy = random_rows([9, 4, 16, 11, 5]), policy_of(folder)
    policy(collate(rows, (), CPU))[0].sum().div(-sum(sum(row.mask) for row in rows)).backward()
    for name, p in policy.named_parameters():
        assert torch.allclose(got[name], p.grad.full_tensor(), atol=1e-5), name


@pytest.mark.parametrize(
    "world, asked, mesh", [(8, 2, [4, 2]), (8, 4, [2, 4]), (6, 3, [2, 3]), (8, 8, [8]), (8, 0, [8])]
)
def test_so_many_adjacent_ranks_share_one_copy(folder, world, asked, mesh, monkeypatch):
    """The last dimension of a mesh runs over adjacent ranks."""
    meshes, units = [], []
    monkeypatch.setattr(policy.dist, "get_world_size", lambda: world)
    monkeypatch.setattr(policy, "init_device_mesh", lambda _, *told, **names: (*told, names))
    monkeypatch.setattr(policy, "_receive", lambda unit, _: units.append(unit))
    monkeypatch.setattr(policy, "fully_shard", lambda _, mesh: meshes.append(mesh))
    whole = load_policy(folder, False)
    shard(whole, CPU, asked)
    names = ("replicate", "shard")[-len(mesh) :]
    assert meshes == [(tuple(mesh), {"mesh_dim_names": names})] * len(units)
    assert units == [*whole.hf.model.layers, whole]


def test_only_the_last_microbatch_adds_up_replicas():
    class Recorder:
        def set_requires_all_reduce(self, value):
            seen.append(value)

    seen = []
    for microbatch in each_microbatch(Recorder(), ["a", "b", "c"]):
        seen.append(microbatch)
    assert seen == [False, "a", False, "b", True, "c"]


ONE_READS = """
import sys, torch
sys.path[:0] = [{root!r}]
from reagent import run
from reagent.policy import full_weights, load_policy, shard

def memory(kind):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

rank, world, device = run.init_distributed(120)
before = memory("VmRSS")
policy = shard(load_policy({folder!r}, False), device)
peak = memory("VmHWM") - before
weights = dict(full_weights(policy, torch.float32))
weights |= dict(policy.named_buffers())
tied = policy.hf.lm_head.weight is policy.hf.model.embed_tokens.weight
torch.save((weights, tied, peak), {out!r} + str(rank))
torch.distributed.barrier()
del policy
"""


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rank_0_reads_and_the_others_receive_their_shards(tied, tmp_path, monkeypatch):
    """The values are the file's to the bit on every rank; who only receives never holds all."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back at once
    model, script, out = tmp_path / "model", tmp_path / "read.py", str(tmp_path / "read-")
    shape = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=8000)
    heads = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=64)
    config = Qwen3Config(**shape, **heads)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(model)
    script.write_text(ONE_READS.format(root=str(ROOT), folder=str(model), out=out))
    torchrun(script)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = whole.state_dict()
    expected |= {f"hf.{name}": value for name, value in whole.named_buffers()}
    size, peaks = 4 * sum(p.numel() for p in whole.parameters()), []
    for rank in (0, 1):
        weights, is_tied, peak = torch.load(out + str(rank))
        assert weights.keys() == expected.keys() and is_tied == tied
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        peaks.append(peak)
    print(f"{size / 1e6:.0f} MB of parameters, peaks {[round(p / 1e6) for p in peaks]} MB")
    assert peaks[1] < 0.8 * size


def test_the_head_compiled_is_the_head(monkeypatch):
    """As on a GPU, through the compiler's front (no code is generated here)."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 8), torch.randn(40, 8)
    targets = torch.randint(40, (10, 1))
    logits = hidden @ weight.t()
    plain = policy.head_statistics(logits, targets, 0.7, False)
    fast = torch.compile(policy.head_statistics, backend="aot_eager", fullgraph=True)
    for a, b in zip(fast(logits, targets, 0.7, False)[:3], plain):
        assert torch.allclose(a, b, atol=1e-6)
    options = dict(logits=logits, probs=None, targets=targets, norm=plain[2], temperature=0.7)
    options |= dict(scale=torch.randn(10, 1), dtype=torch.bfloat16)
    fast = torch.compile(policy.head_gradient, backend="aot_eager", fullgraph=True)
    assert torch.equal(fast(**options), policy.head_gradient(**options))
    assert torch.equal(logits, hidden @ weight.t())  # its input is read only


def test_moments_made_ahead_change_no_step(folder):
    def after(make):
        policy = policy_of(folder)
        optimizer = make(policy)
        for _ in range(3):
            gradients(policy, [random_rows([9, 4])])
            optimizer.step()
        return [p.full_tensor() for p in policy.parameters()]

    ahead = after(functools.partial(make_optimizer, lr=1e-2, weight_decay=0.1))
    lazy = after(lambda p: torch.optim.AdamW(p.parameters(), lr=1e-2, weight_decay=0.1))
    assert all(torch.equal(a, b) for a, b in zip(ahead, lazy))


@pytest.mark.parametrize("saved_on, goes_on", [(False, True), (True, False)])
def test_a_run_that_goes_on_elsewhere_steps_as_this_device_does(
    folder, tmp_path, monkeypatch, saved_on, goes_on
):
    """On a GPU fused, with cpu_offload too, whatever the checkpoint says of the device it was made
    on; the step is the same."""
    policy = policy_of(folder)

    def make(on_gpu):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: on_gpu)
            return make_optimizer(policy, lr=1e-2, weight_decay=0.1)

    optimizer = make(saved_on)

    def step():
        gradients(policy, [random_rows([9, 4])])
        optimizer.step()
        return [p.full_tensor().clone() for p in policy.parameters()]

    step()
    parts = (policy, optimizer, load_tokenizer(folder), {}, lambda *_: None)
    saved, straight = run.save_checkpoint(tmp_path, 1, *parts), step()
    optimizer = make(goes_on)
    run.load_checkpoint(saved, policy, optimizer, lambda *_: None)
    assert optimizer.param_groups[0]["fused"] is (goes_on or None)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(step(), straight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_restores_parameters_optimizer_and_facts_to_the_bit(folder, tmp_path, dtype):
    policy = policy_of(folder)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    tokenizer = load_tokenizer(folder)

    def step():
        gradients(policy, [random_rows([9, 4])])
        optimizer.step()
        return [p.full_tensor().clone() for p in policy.parameters()]

    step()
    named = {"log": [{"step": 1, "loss": 2.5}]}
    parts = (policy, optimizer, tokenizer, named, lambda *_: None)
    saved = run.save_checkpoint(tmp_path, 1, *parts, dtype)
    straight = step()
    step()
    facts = run.load_checkpoint(saved, policy, optimizer, lambda *_: None)
    assert facts == {"step": 1, **named}
    assert all(torch.equal(a, b) for a, b in zip(step(), straight))
    # and beside it is a Hugging Face folder, without the state: to be served or uploaded as it is
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert again.config.model_type == "qwen3" and again.dtype == dtype
    assert json.loads((saved / "config.json").read_text())["dtype"] == str(dtype)[6:]
    stored = load_file(saved / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    assert not [path for path in saved.rglob("*") if "distcp" in path.name or path.is_dir()]
    assert "| loss | 2.5 |" in (saved / "README.md").read_text()


def test_a_checkpoint_takes_its_name_when_all_of_it_is_on_the_disk(folder, tmp_path, monkeypatch):
    policy, flushed, named, rename = policy_of(folder), set(), [], Path.rename
    optimizer = torch.optim.AdamW(policy.parameters())

    def told(handle):
        flushed.add(Path(os.readlink(f"/proc/self/fd/{handle}")))

    def renamed(path, name):
        if path.is_dir():  # torch renames files inside
            assert flushed >= {path, *path.rglob("*")}, f"{path} is named {name}"
            named.append(Path(name))
        return rename(path, name)

    monkeypatch.setattr(run.os, "fsync", told)
    monkeypatch.setattr(Path, "rename", renamed)
    parts = policy, optimizer, load_tokenizer(folder), {}, lambda *_: None
    saved = run.save_checkpoint(tmp_path, 1, *parts)
    assert named == [run.state_of(saved), saved]  # a folder without its state is no checkpoint


def made(folder, *steps):
    for step in steps:
        (folder / f"step-{step:06d}").mkdir()
        (folder / f"step-{step:06d}" / "trainer.json").write_text("{}")
        run.state_of(folder / f"step-{step:06d}").mkdir(parents=True)


def test_a_half_written_or_empty_folder_is_no_checkpoint(tmp_path):
    made(tmp_path, 2, 999_999, 1_000_000)
    (tmp_path / "step-000002").rename(tmp_path / "step-000003.tmp")
    (tmp_path / "step-999998").mkdir()
    (tmp_path / "step-000009").write_text("")
    assert [p.name for p in run.checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    made(tmp_path, 1, 2, 3, 4)
    run.prune(tmp_path, 2, best_step=1)
    left = ["step-000001", "step-000003", "step-000004"]
    assert [p.name for p in run.checkpoints(tmp_path)] == left
    states = sorted(path.name for path in (tmp_path / "trainer").iterdir())
    assert states == left


def test_prune_without_a_number_keeps_all_and_drops_what_a_kill_left(tmp_path):
    made(tmp_path, 1, 2)
    (tmp_path / "step-000003.tmp").mkdir()
    (tmp_path / "trainer" / "step-000003").mkdir()  # its folder was not renamed any more
    run.prune(tmp_path, 0, best_step=None)
    names = sorted(path.name for path in tmp_path.glob("**/step-*"))
    assert names == ["step-000001", "step-000001", "step-000002", "step-000002"]


def test_resume_names_the_changed_field():
    with pytest.raises(SystemExit, match="lr: 1 -> 2"):
        run.check_resume({"lr": 1, "out_dir": "a"}, {"lr": 2, "out_dir": "b"}, {"out_dir"}, "run")
    run.check_resume(
        {"rrm": "http://a:1/v1"}, {"rrm": "https://b:2/v1,http://c:3/v1"}, set(), "run"
    )  # it moved
    with pytest.raises(SystemExit, match="rrm: 'http://a:1/v1' -> 'out/rrm'"):
        run.check_resume({"rrm": "http://a:1/v1"}, {"rrm": "out/rrm"}, set(), "run")


def test_a_model_that_is_nowhere_is_told_and_a_silent_hub_is_not_asked(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("reagent.policy.hub_answers", lambda: False)
    for name, told in (("out/sft", "run the stage"), ("owner/name", "the hub does not answer")):
        with pytest.raises(SystemExit, match=told):
            policy.load_chat(name)


def test_a_folder_without_a_model_is_a_clear_error(tmp_path):
    (tmp_path / "readme").write_text(json.dumps({}))
    with pytest.raises(SystemExit, match="is not a model folder"):
        load_policy(str(tmp_path), False)
