"""LoRA: nothing changes at the start, merged weights are the trained function, gradients and
optimizer know the adapters only, one rank or two.
"""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, Qwen2Config

import grpo_unified
from reagent import run
from reagent.lora import ADAPTERS, LoraLinear, base_of
from reagent.policy import (
    PolicyConfig,
    collate,
    full_weights,
    load_policy,
    load_tokenizer,
    make_optimizer,
    make_reference,
    shard,
)
from tests.helpers.tiny import ROOT, Alone, random_rows, tiny_model, toy_world
from tests.helpers.trainers import run_here
from tests.loss.test_model import COLUMNS, CPU, assert_same, policy_of, torchrun

RANK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tied"))


def lora_of(folder, checkpoint_activations=False):
    run.init_distributed(60)
    torch.manual_seed(0)
    return shard(load_policy(folder, checkpoint_activations, RANK), CPU)


def trained(policy):
    return {n: p for n, p in policy.named_parameters() if p.requires_grad}


def moved(policy, steps=3):
    """The policy after some steps of SGD-like noise on its adapters."""
    optimizer = make_optimizer(policy, lr=3e-2, weight_decay=0.0)
    for _ in range(steps):
        policy(collate(random_rows([9, 14, 4]), (), CPU))[0].mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy


def logps(policy, seed=1):
    with torch.no_grad():
        return policy(collate(random_rows([7, 19, 19, 3], seed), (), CPU), 0.7)[0]


def test_it_starts_as_its_base(folder):
    assert torch.equal(logps(lora_of(folder)), logps(policy_of(folder)))


def test_layers_with_a_bias_keep_it(tmp_path):
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=256)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(Qwen2Config(**shape, **heads))
    for name, weight in hf.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_()
    hf.save_pretrained(tmp_path)
    policy = lora_of(tmp_path)
    assert torch.equal(logps(policy), logps(policy_of(tmp_path)))
    kept = dict(full_weights(policy, torch.float32))
    assert all(torch.equal(kept[name], value) for name, value in hf.state_dict().items())


def test_only_adapters_have_gradients_and_moments(folder):
    policy = lora_of(folder)
    optimizer = make_optimizer(policy, lr=1e-2, weight_decay=0.1)
    policy(collate(random_rows([9, 4]), (), CPU))[0].mean().backward()
    names = [n for n, p in policy.named_parameters() if p.grad is not None]
    assert names and all(name.endswith(ADAPTERS) for name in names)
    assert len(names) == 2 * 7 * 2  # A and B of seven layers in two blocks
    assert len(optimizer.state) == len(names) == len(trained(policy))
    frozen = {n: p.full_tensor().clone() for n, p in policy.named_parameters()}
    optimizer.step()
    for name, p in policy.named_parameters():
        assert torch.equal(p.full_tensor(), frozen[name]) != name.endswith(ADAPTERS), name


def test_a_gradient_of_the_adapters_is_that_of_plain_pytorch(folder):
    policy, rows = moved(lora_of(folder)), random_rows([9, 4, 16])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sides = {n: p.full_tensor().detach().clone() for n, p in trained(policy).items()}
    leaves = {n: p.requires_grad_() for n, p in sides.items()}
    weights = dict(plain.named_parameters())
    for name in list(weights):
        layer = "hf." + name.removesuffix("weight")
        if layer + "lora_a" in leaves:
            update = leaves[layer + "lora_b"] @ leaves[layer + "lora_a"]
            weights[name] = weights[name] + 2 * update
    expected = 0.0
    for row in rows:
        inputs = dict(input_ids=torch.tensor([row.ids]))
        logits = torch.func.functional_call(plain, weights, (), inputs).logits[0, :-1]
        each = logits.log_softmax(-1).gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]
        expected = expected + each[torch.tensor(row.mask[1:]).bool()].sum()
    expected.backward()
    policy(collate(rows, (), CPU))[0].sum().backward()
    for name, p in trained(policy).items():
        assert leaves[name].grad.abs().max() > 1e-5, name
        assert torch.allclose(p.grad.full_tensor(), leaves[name].grad, atol=1e-4), name


def test_the_sampler_gets_merged_weights_under_the_names_of_the_base(folder):
    policy = moved(lora_of(folder))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = dict(full_weights(policy, torch.float32))
    assert weights.keys() == hf.state_dict().keys()
    hf.load_state_dict(weights)
    rows = random_rows([7, 19, 19, 3], 1)
    expected = []
    for row in rows:
        each = (hf(torch.tensor([row.ids])).logits[0, :-1] / 0.7).log_softmax(-1)
        each = each.gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]
        expected.append(each[torch.tensor(row.mask[1:]).bool()])
    got, start = logps(policy), logps(policy_of(folder))
    assert torch.allclose(got, torch.cat(expected), atol=1e-5)
    assert (got - start).abs().max() > 1e-2


def test_recomputed_activations_do_not_change_the_gradient(folder):
    found = []
    for again in (False, True):
        policy, total = lora_of(folder, again), 0.0
        for rows in ([*random_rows([9, 4])], []):
            batch = collate(rows, COLUMNS, CPU)
            loss = policy(batch, 0.7)[0].sum()
            loss.backward()
            total += loss.item()
        found.append((total, {n: p.grad.full_tensor() for n, p in trained(policy).items()}))
    assert_same(*found)


def test_the_reference_of_the_kl_term_is_the_base_and_leaves_no_trace(folder):
    policy = moved(lora_of(folder))
    cfg = grpo_unified.Config(model=folder, policy=PolicyConfig(lora_rank=RANK))
    reference = make_reference(cfg, policy, CPU)
    before, batch = logps(policy), collate(random_rows([7, 19, 19, 3], 1), (), CPU)
    ours, _ = policy(batch, 0.7)  # a forward whose backward comes after the reference's
    theirs, _ = reference(batch, 0.7)
    assert torch.equal(theirs, logps(policy_of(folder))) and not theirs.requires_grad
    ours.sum().backward()
    got = {n: p.grad.full_tensor().clone() for n, p in trained(policy).items()}
    policy.zero_grad()
    policy(batch, 0.7)[0].sum().backward()
    assert all(torch.equal(p.grad.full_tensor(), got[n]) for n, p in trained(policy).items())
    assert torch.equal(logps(policy), before)


def test_a_reference_that_fails_puts_the_adapters_back(folder):
    policy = lora_of(folder)
    with pytest.raises(AttributeError):
        base_of(policy)(None, 1.0)
    assert all(m.adapts for m in policy.modules() if isinstance(m, LoraLinear))


def test_an_update_of_grpo_with_a_kl_term_moves_the_adapters_only(folder):
    policy, rows = moved(lora_of(folder)), random_rows([9, 4, 16])
    cfg = grpo_unified.Config(
        model=folder, policy=PolicyConfig(lora_rank=RANK), kl_coef=0.1, max_dlogp=1e9
    )
    optimizer = make_optimizer(policy, lr=1e-2, weight_decay=0.0)
    reference = make_reference(cfg, policy, CPU)
    done = grpo_unified.update(policy, optimizer, [[rows]], cfg, Alone(), reference)
    assert abs(done["kl"]) > 0 and not done["skipped"] and done["norms"][0] > 0
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    kept = {n: p for n, p in policy.hf.state_dict().items() if not n.endswith(ADAPTERS)}
    assert all(torch.equal(p.full_tensor(), base[name]) for name, p in kept.items())


def test_a_base_in_bf16_trains_beside_adapters_in_fp32_as_on_a_gpu(folder, monkeypatch):
    """The types that a GPU has, on the CPU: FSDP gathers both in bf16 and adds up in fp32."""
    run.init_distributed(60)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        torch.manual_seed(0)
        policy = load_policy(folder, True, RANK)
    frozen = {p.dtype for p in policy.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16} and policy.hf.model.rotary_emb.inv_freq.dtype == torch.float32
    dtypes = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in [*policy.hf.model.layers, policy]:
        fully_shard(unit, mesh=init_device_mesh("cpu", (1,)), mp_policy=dtypes)
    exact, rows = lora_of(folder), random_rows([30, 9, 14])
    found = []
    for each in (moved(policy), moved(exact)):
        logps, _ = each(collate(rows, (), CPU))
        logps.mean().backward()
        grads = {n: p.grad.full_tensor() for n, p in trained(each).items()}
        assert {g.dtype for g in grads.values()} == {torch.float32}
        found.append((logps.detach(), grads))
    (near, grads), (logps, expected) = found
    assert (near - logps).abs().mean() < 0.05
    for name in grads:
        cosine = torch.cosine_similarity(grads[name].flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.95, (name, cosine)  # both after three steps of their own
    assert all(value.dtype == torch.bfloat16 for _, value in full_weights(policy, torch.bfloat16))


TWO_RANKS = """
import sys, torch
sys.path[:0] = [{root!r}]
from reagent import run
from reagent.lora import base_of
from reagent.policy import backward, balance, collate, full_weights, load_policy, make_optimizer
from reagent.policy import clip_gradients, shard
from tests.helpers.tiny import random_rows

def steps(policy, rank, world, device):
    optimizer = make_optimizer(policy, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        rows = random_rows([9, 4, 16, 30, 5], step)
        for microbatch in balance(rows, world, 32)[rank]:
            batch = collate(microbatch, (), device)
            logps = policy(batch)[0]
            apart = logps - base_of(policy)(batch)[0]
            backward(-logps.sum() / 64 + apart.square().sum() / 640)
        clip_gradients(policy, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return dict(full_weights(policy, torch.float32))

if __name__ == "__main__":
    rank, world, device = run.init_distributed(60)
    torch.manual_seed(0)  # rank 1 draws nothing: its adapters come from rank 0
    weights = steps(shard(load_policy({folder!r}, False, 4), device), rank, world, device)
    if rank == 0:
        torch.save(weights, {out!r})
    torch.distributed.barrier()
"""


def test_two_ranks_train_as_one(folder, tmp_path):
    script, out = tmp_path / "two.py", tmp_path / "two.pt"
    script.write_text(TWO_RANKS.format(root=str(ROOT), folder=folder, out=str(out)))
    torchrun(script)
    two, space = torch.load(out), {"__name__": "two"}
    exec(compile(script.read_text(), str(script), "exec"), space)
    one = space["steps"](lora_of(folder), 0, 1, CPU)
    assert two.keys() == one.keys() and all(torch.allclose(two[n], one[n], atol=1e-5) for n in one)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert max((one[n] - base[n]).abs().max() for n in one) > 1e-2


@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_run_goes_on_to_the_bit_and_leaves_a_plain_folder(tmp_path, stop):
    import sft

    world = toy_world(tmp_path)
    base = [f"--model={world}/model", f"--data={world}/sft.jsonl", "--rows_per_step=4", "--lr=1e-2"]
    base += [
        "--warmup_steps=1",
        "--policy.checkpoint_activations=false",
        "--lr_end=1",
        "--policy.lora_rank=4",
    ]
    ends = {}
    for name, runs in (("straight", [3]), ("stopped", [stop, 3])):
        for steps in runs:
            log = run_here(sft, [*base, f"--steps={steps}", f"--out_dir={tmp_path}/{name}"])
        ends[name] = (
            load_file(tmp_path / name / "step-000003" / "model.safetensors"),
            [(line["loss"], line["grad_norm"]) for line in log],
        )
    (straight, a), (stopped, b) = ends.values()
    assert a == b and all(torch.equal(straight[n], stopped[n]) for n in straight)
    saved = tmp_path / "straight" / "step-000003"
    start = load_file(world / "model" / "model.safetensors")
    assert straight.keys() == start.keys()
    assert any(not torch.equal(straight[n], start[n]) for n in start)
    AutoModelForCausalLM.from_pretrained(saved)
    (state,) = {path.parent for path in (tmp_path / "straight").rglob("*.distcp")}
    kept = FileSystemReader(state).read_metadata().state_dict_metadata
    kept = {key for key in kept if key.startswith("model.")} - {"model.hf.lm_head.weight"}  # tied
    assert len(kept) == 2 * 7 * 2 and all(key.endswith(ADAPTERS) for key in kept)
    facts = json.loads((saved / "trainer.json").read_text())
    assert facts["config"]["policy"]["lora_rank"] == 4 and load_tokenizer(str(saved))


@pytest.mark.parametrize("stage", ["u", "rrm"])
def test_the_sampler_of_a_run_samples_from_the_adapted_policy(tmp_path, stage, monkeypatch):
    """At the second step its log-probs are the trainer's, after a first that moved them."""
    import train_rrm
    from tests.helpers.tiny import toy
    from tests.runs.test_wiring import ANNOTATE, Rules, any_judgment

    world, rng = toy_world(tmp_path, heads=1, kv_heads=1), random.Random(0)
    toy.write(world / "rrm.jsonl", (toy.rrm_row(rng, i) for i in range(8)))
    (world / "rrm.py").write_text(ANNOTATE)
    common = [f"--model={world}/model", "--steps=2", "--lr=1e-2", "--engine=hf", "--group_size=4"]
    common += [
        "--policy.lora_rank=4",
        "--policy.checkpoint_activations=false",
        f"--out_dir={tmp_path}/out",
    ]
    common += ["--max_context=1024", "--max_dlogp=1e-3"]
    if stage == "u":
        monkeypatch.setattr(grpo_unified, "rule_reward", Rules())
        own = [f"--data={world}/rl.jsonl", f"--rrm={world}/rrm.py", "--prompts_per_step=2"]
        own += ["--prompts_per_minibatch=2", "--max_turns=2", "--max_new_tokens_per_turn=12"]
        log = run_here(grpo_unified, [*common, *own, "--tools=search", "--kl_coef=0.1"])
        assert log[0]["kl"] == 0 and log[1]["kl"] != 0  # from the base
    else:
        monkeypatch.setattr(train_rrm, "read_judgment", any_judgment)
        own = [f"--data={world}/rrm.jsonl", "--judgments_per_step=4", "--max_judgment_tokens=16"]
        log = run_here(train_rrm, [*common, *own])
    assert all(line["grad_norm"] > 0 and line["dlogp/mean"] < 1e-5 for line in log), log
    start = load_file(world / "model" / "model.safetensors")
    saved = load_file(tmp_path / "out" / "step-000002" / "model.safetensors")
    assert saved.keys() == start.keys()
    assert max((saved[name] - start[name]).abs().max() for name in start) > 1e-3
