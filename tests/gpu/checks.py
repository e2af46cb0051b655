"""What only a GPU can show, most important first, each within its own time: one card, under 10
minutes together. Also without pytest, on a borrowed machine:

    python tests/gpu/checks.py [NAME …]     # all, each in a process of its own
    python tests/gpu/checks.py --small …    # the same steps on a CPU with tiny shapes: a dry run

Each prints one JSON line of figures and of faults; a check without faults has passed. One that is
not done in its time tells the figures that it had.
"""

import asyncio
import importlib
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]
# seconds of a process
LIMITS = {"dense": 40, "kernels": 105, "speed": 140, "engine": 135, "toy": 140, "plan": 35}
VOCABULARY = 151_936
QWEN3_06B = dict(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=VOCABULARY,
)
SMALL = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=512,
)


def shape_of(small: bool, **changes):
    from transformers import Qwen3Config

    sizes = (SMALL if small else QWEN3_06B) | changes
    return Qwen3Config(tie_word_embeddings=True, max_position_embeddings=40_960, **sizes)


def sequences_of(lengths, vocabulary, prompt=8) -> list:
    """Random rows whose first `prompt` tokens are not trained, with the columns of an RL step."""
    from reagent.policy import Sequence

    rng, found = random.Random(0), []
    for n in lengths:
        ids, trained = [rng.randrange(vocabulary) for _ in range(n)], n - prompt
        columns = dict(
            advantage=[rng.choice([-1.0, 1.0]) for _ in range(trained)],
            weight=[1 / (len(lengths) * trained)] * trained,
            sampler_logps=[-math.log(vocabulary)] * trained,
        )
        found.append(Sequence(ids, [0] * prompt + [1] * trained, columns))
    return found


class Alone:
    """As much of reagent.run.Run as a step needs, on one rank."""

    def __init__(self):
        from reagent.run import init_distributed

        self.rank, self.world, self.device = init_distributed(300)

    def sum(self, numbers):
        return numbers


def folder_of(config, folder, seed=0) -> str:
    """A model with random weights and a tokenizer of numbers as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    words = {"[UNK]": 0} | {str(i): i for i in range(1, 256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[UNK]")
    plain.save_pretrained(folder)
    return str(folder)


def tell(found: dict) -> None:
    """The figures so far, in case that this check is not done in its time."""
    print(json.dumps(dict(figures=found)), flush=True)


def has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


# --------------------------------------------------------------------------------------------------
# the checks


def dense(small: bool) -> tuple[dict, list[str]]:
    """bf16, packed, through FSDP, against fp32 a row at a time: log-probs and gradients."""
    import torch
    from transformers import AutoModelForCausalLM

    from reagent.policy import Policy, backward, collate, shard

    run = Alone()
    config = shape_of(small, num_hidden_layers=4 if not small else 2, vocab_size=20_000)
    torch.manual_seed(0)
    with torch.device(run.device):
        options = dict(attn_implementation="sdpa", dtype=torch.float32)
        hf = AutoModelForCausalLM.from_config(config, **options)
    rows = sequences_of([700, 12, 300, 47, 1000], config.vocab_size)
    trained = sum(sum(row.mask) for row in rows)
    expected = []
    for row in rows:
        ids = torch.tensor([row.ids], device=run.device)
        logps = hf(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        logps = logps.gather(1, ids[0, 1:, None])[:, 0]
        expected.append(logps[torch.tensor(row.mask[1:], device=run.device).bool()])
    expected = torch.cat(expected)
    (-expected.sum() / trained).backward()
    gradients = {name: p.grad.clone() for name, p in hf.named_parameters()}
    hf.zero_grad()
    hf.set_attn_implementation("varlen")
    policy = shard(Policy(hf).train(), run.device)
    logps, _ = policy(collate(rows, (), run.device))
    backward(-logps.sum() / trained)
    gaps, cosines = (logps - expected).detach().abs(), {}
    for name, p in policy.hf.named_parameters():
        got = p.grad.full_tensor().flatten()
        cosines[name] = torch.cosine_similarity(got, gradients[name].flatten(), dim=0).item()
    worst = min(cosines, key=cosines.get)
    found = dict(dlogp_mean=gaps.mean().item(), dlogp_max=gaps.max().item())
    found |= dict(parameters=len(cosines), worst_cosine=cosines[worst], worst=worst)
    if run.device.type == "cuda":  # set once torch is imported: does it count?
        settings = torch.cuda.memory._snapshot()["allocator_settings"]
        found["expandable_segments"] = settings.get("expandable_segments")
    faults = []
    if found["dlogp_mean"] > 0.02 or found["dlogp_max"] > 0.15:
        faults.append("log-probs in bf16 are far from fp32")
    if cosines[worst] < 0.998 or len(cosines) != len(gradients):
        faults.append("a gradient in bf16 points elsewhere, or is missing")
    return found, faults


def kernels(small: bool) -> tuple[dict, list[str]]:
    """Each kernel of attention against dense fp32, with its seconds for short and long rows; then
    compiled blocks and head against plain ones: log-probs and gradients.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from reagent import attention
    from reagent.lora import add_lora
    from reagent.policy import Policy, backward, collate, compile_blocks, shard

    run, heads, found, faults = Alone(), (16, 8, 128), {}, []
    cuda = run.device.type == "cuda"
    for name in ("torch", "cudnn", "flash"):
        why = attention.problem(name, heads, run.device)
        if why:  # flash-attn-4 may be missing on a borrowed machine: then its figure says so
            found[name] = why
            faults += [f"{name}: {why}"] if name != "flash" else []
        else:
            kernel = "torch" if name == "flash" else name
            found[f"{name}_distance"] = attention.distance(kernel, heads, run.device)
            for rows in (attention.SHORT_ROWS, attention.LONG_ROW) if cuda else ():
                spent = attention.seconds(kernel, rows, heads, run.device)
                found[f"{name}_{len(rows)}_rows_ms"] = round(1e3 * spent, 2)
            if name != "cudnn":  # which leaves trees to the others
                gap, cosine = tree_gap(run, small)
                found |= {f"{name}_tree_dlogp": gap, f"{name}_tree_cosine": cosine}
                if gap > 0.02 or cosine < 0.995:
                    faults.append(f"{name}: a tree is not its rows")
        attention.leave_flash()
        tell(found)
    config = shape_of(small, num_hidden_layers=2, vocab_size=20_000 if cuda else 512)
    lengths = [[300, 12, 150], [700], [64] * 5, [333, 500, 9]]
    batches = [collate(sequences_of(n, config.vocab_size), (), run.device) for n in lengths]
    told = {}
    for backend in (None, "inductor" if cuda else "eager"):
        torch.manual_seed(0)
        with torch.device(run.device):
            options = dict(attn_implementation="varlen", dtype=torch.float32)
            hf = AutoModelForCausalLM.from_config(config, **options)
        policy = Policy(hf).train()
        if backend:
            compile_blocks(policy, backend)
        policy, logps = shard(policy, run.device), []
        for batch in batches:
            logps.append(policy(batch)[0])
            backward(logps[-1].mean())
        told[backend] = (
            torch.cat(logps).detach(),
            {name: p.grad.full_tensor().flatten() for name, p in policy.named_parameters()},
        )
    (a, grads_a), (b, grads_b) = told.values()
    cosines = [torch.cosine_similarity(grads_a[n], grads_b[n], dim=0).item() for n in grads_a]
    found |= dict(compiled_dlogp=(a - b).abs().mean().item(), compiled_cosine=min(cosines))
    if found["compiled_dlogp"] > 0.02 or min(cosines) < 0.995:
        faults.append("compiled blocks compute something else")
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="varlen").to(run.device)
    add_lora(hf, 8)
    policy = shard(Policy(hf).train(), run.device)
    backward(policy(batches[0])[0].mean())
    grads = [n for n, p in policy.named_parameters() if p.grad is not None]
    if not grads or not all("lora_" in name for name in grads):
        faults.append("LoRA: gradients elsewhere than in the adapters, or none")
    return found, faults


def tree_gap(run, small: bool) -> tuple[float, float]:
    """Of eight continuations of one prefix, as a tree and in rows of their own: mean difference of
    log-probs, smallest cosine of a gradient."""
    import torch
    from transformers import AutoModelForCausalLM

    from reagent.policy import Policy, backward, collate, shard
    from tests.helpers.tiny import apart, tree_of

    config = shape_of(small, num_hidden_layers=2, vocab_size=512 if small else 20_000)
    tree, found = tree_of(900, [70, 1, 300, 64, 64, 128, 33, 5], random.Random(0)), []
    for rows in ([tree], apart(tree)):
        torch.manual_seed(0)
        with torch.device(run.device):
            options = dict(attn_implementation="varlen", dtype=torch.float32)
            hf = AutoModelForCausalLM.from_config(config, **options)
        policy = shard(Policy(hf).train(), run.device)
        logps = policy(collate(rows, (), run.device))[0]
        backward(logps.mean())
        grads = [p.grad.full_tensor().flatten() for p in policy.parameters()]
        found.append((logps.detach(), grads))
    (a, grads_a), (b, grads_b) = found
    cosines = (torch.cosine_similarity(x, y, dim=0).item() for x, y in zip(grads_a, grads_b))
    return (a - b).abs().mean().item(), min(cosines)


def speed(small: bool) -> tuple[dict, list[str]]:
    """The step as it is now beside what it was (tests/bench/card.py): 1.9 and 2.4 times."""
    from tests.bench import card

    run, found, faults = Alone(), {}, []
    goals = {"RL, rows of 16,384, now": 1.9 * 21_460, "RL, rows of 512, now": 2.4 * 36_588}
    for case in card.CASES[:2]:
        told = card.measure(card.small(case) if small else case, run, small)
        found[case.name] = told
        tell(found)
        if not small and not told.get("tokens", 0) >= goals[case.name]:
            faults.append(f"{case.name}: {told}, not {goals[case.name]:,.0f} tokens/s")
    return found, faults


def engine(small: bool) -> tuple[dict, list[str]]:
    """The engine beside the trainer: agreement, sleep, a stale sampler, the sync; then its speed
    beside a bare loop over add_request and step, and vLLM's own generate.
    """
    import torch

    from reagent.engines import EngineConfig, VLLMEngine
    from reagent.policy import Sequence, backward, collate, full_weights, load_policy, shard

    if not has_vllm():
        return {}, ["vLLM is not installed (make gpu)"]
    run, config = Alone(), shape_of(small)
    folder = folder_of(config, tempfile.mkdtemp())
    context, dtype = (256, torch.float32) if small else (8192, torch.bfloat16)
    began = time.perf_counter()
    share = EngineConfig(memory_share=0.4)
    sampler = VLLMEngine(folder, [], config=share, max_context=context)
    found = dict(start_s=round(time.perf_counter() - began, 1), awake_gb=used_gb())
    sampler.sleep()
    policy = shard(load_policy(folder, False), run.device)
    found |= dict(asleep_gb=used_gb(), policy_gb=4 * parameters_of(policy) / 1e9)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)

    def sync() -> float:
        began = time.perf_counter()
        sampler.load_weights(full_weights(policy, dtype))
        return round(time.perf_counter() - began, 3)

    rng = random.Random(0)
    lengths = [rng.randint(20, 100 if small else 400) for _ in range(8 if small else 64)]
    prompts = [[rng.randrange(config.vocab_size) for _ in range(n)] for n in lengths]

    def gap() -> float:
        samples, gaps = sample(sampler, prompts, 64), []
        for prompt, one in zip(prompts, samples):
            row = Sequence(prompt + one.ids, [0] * len(prompt) + [1] * len(one.ids))
            with torch.no_grad():
                logps = policy(collate([row], (), run.device), 0.9)[0].cpu()
            gaps.append((logps - torch.tensor(one.logps)).abs())
        return torch.cat(gaps).mean().item()

    found |= dict(first_sync_s=sync(), before=gap())
    logps, _ = policy(collate(sequences_of([200] * 8, config.vocab_size), (), run.device))
    backward(-logps.mean())
    optimizer.step()
    optimizer.zero_grad()
    found["stale"] = gap()
    sampler.sleep()
    found |= dict(sync_s=sync(), after=gap())
    tell(found)
    faults = []
    if found["after"] > 2 * found["before"] + 1e-3 or found["stale"] < 5 * found["after"]:
        faults.append("the sync does not bring the trainer's weights to the sampler")
    if torch.cuda.is_available() and found["asleep_gb"] - found["policy_gb"] > 5:
        faults.append("an engine that sleeps keeps more than 5 GB")
    speeds, slow = rollout_speed(sampler, config.vocab_size, small)
    sampler.close()
    return found | speeds | dict(closed_gb=used_gb()), faults + slow


def rollout_speed(sampler, vocabulary: int, small: bool) -> tuple[dict, list[str]]:
    """Tokens a second of a burst of requests: through the engine, a bare loop, vLLM's generate; the
    best of some, and the least CPU time of the process, which other processes disturb less.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    count, prompt, new = (64, 16, 64) if small else (512, 512, 128)
    rng = random.Random(1)

    def fresh() -> list[list[int]]:
        return [[rng.randrange(vocabulary) for _ in range(prompt)] for _ in range(count)]

    def parameters(seed):
        options = dict(max_tokens=new, temperature=0.9, seed=seed, logprobs=0)
        options["output_kind"] = RequestOutputKind.FINAL_ONLY
        return SamplingParams(**options, ignore_eos=True, detokenize=False)

    def ours():
        sample(sampler, fresh(), new)

    def bare():
        core = sampler.llm.llm_engine
        for seed, ids in enumerate(fresh()):
            core.add_request(f"bare-{rng.random()}", {"prompt_token_ids": ids}, parameters(seed))
        while core.has_unfinished_requests():
            core.step()

    def own():
        asked = [{"prompt_token_ids": ids} for ids in fresh()]
        sampler.llm.generate(asked, [parameters(s) for s in range(count)], use_tqdm=False)

    def in_thread(work):
        return lambda: sampler.thread.call(work)

    found = {}
    for name, work in (("ours", ours), ("bare", in_thread(bare)), ("generate", in_thread(own))):
        seconds, busy = [], []
        for _ in range(5 if small else 2):
            began, began_busy = time.perf_counter(), time.process_time()
            work()
            seconds.append(time.perf_counter() - began)
            busy.append(time.process_time() - began_busy)
        found[f"{name}_tok_s"] = round(count * new / min(seconds))
        found[f"{name}_cpu_s"] = round(min(busy), 3)
    found["of_bare"] = round(found["ours_tok_s"] / found["bare_tok_s"], 3)
    found["of_generate"] = round(found["ours_tok_s"] / found["generate_tok_s"], 3)
    fast = found["of_bare"] >= 0.95 and found["of_generate"] >= 0.9
    return found, [] if fast or small else ["the engine gives away vLLM's speed"]


def sample(sampler, prompts, new: int) -> list:
    async def all_of_them():
        options = dict(max_new_tokens=new, temperature=0.9)
        asked = [sampler.generate(ids, seed=i, **options) for i, ids in enumerate(prompts)]
        return await asyncio.gather(*asked)

    return asyncio.run(all_of_them())


def toy_arguments(out, agent: str, kind: str, steps: int) -> list[str]:
    """Of grpo_unified.py, with the rule annotator."""
    place = [f"--model={agent}", f"--out_dir={out}/u", "--rrm=data/toy/prepare.py"]
    place += [f"--data={out}/rl_train.jsonl", f"--eval_data={out}/rl_test.jsonl"]
    place += [f"--engine={kind}", "--engine.memory_share=0.3", f"--steps={steps}"]
    return ["config/grpo_unified_toy_tiny.py", *place]


def toy(small: bool) -> tuple[dict, list[str]]:
    """The toy from nothing: SFT, then Reagent-U with vLLM that sleeps and the rule annotator, to
    0.8 of the held-out questions in 24 steps; |dlogp| stays within the preset's limit.
    """
    out = Path(tempfile.mkdtemp())
    kind = "vllm" if has_vllm() and not small else "hf"
    steps, sft_steps = (2, 20) if small else (24, 250)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}

    def script(name, *args) -> float:
        began = time.perf_counter()
        start = f"import tests.gpu.older, runpy; runpy.run_path({name!r}, run_name='__main__')"
        command = [sys.executable, "-c", start, *map(str, args)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
        return round(time.perf_counter() - began, 1)

    script("data/toy/prepare.py", f"--out={out}")
    place = [f"--model={out}/model", f"--data={out}/sft.jsonl", f"--out_dir={out}/sft"]
    found = dict(
        engine=kind,
        sft_s=script("sft.py", "config/sft_toy_tiny.py", *place, f"--steps={sft_steps}"),
    )
    tell(found)
    agent = f"{out}/sft/step-{sft_steps:06d}"
    found["u_s"] = script("grpo_unified.py", *toy_arguments(out, agent, kind, steps))
    log = [json.loads(line) for line in open(out / "u" / "log.jsonl")]
    found |= dict(first=log[0]["eval/first"], last=log[-1]["eval/first"])
    dlogps = [line["dlogp/mean"] for line in log[1:]]
    found |= dict(dlogp_first=dlogps[0], dlogp_last=dlogps[-1])
    found["step_s"] = round(sum(line["seconds/step"] for line in log[2:]) / (len(log) - 2), 2)
    good = found["last"] >= 0.8 or small
    return found, [] if good else [f"the toy ended at {found['last']:.2f}, not at 0.8"]


def plan(small: bool) -> tuple[dict, list[str]]:
    """A step's peak of memory against the plan, with activations kept and recomputed; its speed."""
    import torch
    from transformers import AutoModelForCausalLM

    import grpo_unified
    from reagent.memory import CONTEXT, memory_plan
    from reagent.policy import Policy, balance, make_optimizer, shard

    run, config = Alone(), shape_of(small)
    tokens = 512 if small else 16_384
    rows = sequences_of([tokens] * 2, config.vocab_size)
    cfg = grpo_unified.Config(max_dlogp=math.inf, temperature=1.0)
    found, faults = {}, []
    for again in (True, False):
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        with torch.device(run.device):
            options = dict(attn_implementation="varlen", dtype=torch.float32)
            hf = AutoModelForCausalLM.from_config(config, **options)
        if again:
            hf.gradient_checkpointing_enable(dict(use_reentrant=False))
        policy = shard(Policy(hf).train(), run.device)
        optimizer = make_optimizer(policy, lr=1e-6, weight_decay=0.0)
        microbatches = balance(rows, 1, tokens)[0]
        for _ in range(2):
            began = time.perf_counter()
            grpo_unified.update(policy, optimizer, [microbatches], cfg, run)
            used_gb()  # waits for the card
            seconds = time.perf_counter() - began
        width = 2 if run.device.type == "cuda" else 4
        shape = dict(tokens=tokens, checkpoint_activations=again, width=width)
        parts = memory_plan(config, ranks=1, **shape)
        planned = max(sum(p.values()) for p in parts.values()) - (CONTEXT if width == 2 else 0)
        name = "again" if again else "kept"
        found[f"{name}_planned_gb"] = round(planned / 1e9, 1)
        found[f"{name}_tok_s"] = round(2 * tokens / seconds)
        if width == 2:
            peak = torch.cuda.max_memory_allocated()
            found[f"{name}_peak_gb"] = round(peak / 1e9, 1)
            if not 0.85 < planned / peak < 1.15:
                faults.append(f"the plan is {planned / peak:.2f} of the peak ({name})")
        tell(found)
        del hf, policy, optimizer
    return found, faults


def used_gb() -> float:
    """What the card holds, of all processes."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return round((total - free) / 1e9, 1)


def parameters_of(policy) -> int:
    return sum(p.numel() for p in policy.parameters())


CHECKS = {"dense": dense, "kernels": kernels, "speed": speed}
CHECKS |= {"engine": engine, "toy": toy, "plan": plan}


def run_check(name: str, small: bool = False) -> dict:
    """The check in a process of its own, within its limit: {"figures", "faults", "seconds"}."""
    began, limit = time.monotonic(), 600 if small else LIMITS[name]
    command = [sys.executable, __file__, "--here", *["--small"][: int(small)], name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
        printed, fault = done.stdout, done.stderr[-3000:]
    except subprocess.TimeoutExpired as late:
        printed, fault = (late.stdout or b"").decode(), f"not done in {limit} s"
    lines = [x for x in printed.splitlines() if x.startswith('{"figures"')]
    told = json.loads(lines[-1]) if lines else dict(figures={})
    told.setdefault("faults", [fault])
    return told | dict(seconds=round(time.monotonic() - began, 1))


def main(argv: list[str]) -> None:
    importlib.import_module("tests.gpu.older")
    names, small = [name for name in argv if name in CHECKS], "--small" in argv
    if "--here" in argv:
        figures, faults = CHECKS[names[0]](small)
        print(json.dumps(dict(figures=figures, faults=faults)), flush=True)
        return
    for name in names or CHECKS:
        print(json.dumps(dict(check=name) | run_check(name, small)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
