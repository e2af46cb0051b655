"""The check of a model's function at load, on tiny random models of many families."""

import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM

from reagent.attention import row_ends, varlen_attention
from reagent.policy import check_forward, load_policy

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
WINDOW = dict(sliding_window=4096)
PASS = {
    "Qwen2": {},
    "Qwen2, a window": dict(use_sliding_window=True, max_window_layers=2, **WINDOW),
    "Qwen3": dict(head_dim=16),
    "Qwen3Moe": dict(head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16),
    "Llama": {},
    "Mistral": dict(sliding_window=None),
    "Mistral, a window": WINDOW,
    "Olmo2": {},
    "Olmo3": WINDOW,
    "Olmoe": dict(num_experts=8, num_experts_per_tok=2),
    "Phi3": {},
    "Glm4": dict(head_dim=8),
    "Gemma3Text": dict(head_dim=8, **WINDOW),
}
REFUSED = {
    "Cohere": ({}, "'logit_scale': 0.0625"),
    "Granite": (dict(logits_scaling=8.0), "'logits_scaling': 8.0"),
    "Gemma2": (dict(head_dim=8, **WINDOW), "its attention has a softcap"),
    "Gemma2, the last softcap alone": (
        dict(head_dim=8, attn_logit_softcapping=None, **WINDOW),
        "'final_logit_softcapping': 30.0",
    ),
    "GptOss": (dict(head_dim=8, num_local_experts=4), "its attention has sinks"),
    "Lfm2": (dict(layer_types=["conv", "full_attention"] * 2), "'conv_L_cache'"),
    "Phi": ({}, "its head has a bias"),
    "GPT2": ({}, "no model.layers"),
    "Bloom": ({}, "no model.layers"),
    "Mamba": ({}, "no model.layers"),
}


def config_of(name: str, **more):
    family = name.partition(",")[0]
    return getattr(transformers, f"{family}Config")(**SIZES | more)


@pytest.mark.parametrize("name", PASS)
def test_a_family_whose_function_is_computed_passes(name):
    state = torch.random.get_rng_state()
    check_forward(config_of(name, **PASS[name]))
    assert torch.equal(state, torch.random.get_rng_state())  # a run's numbers stay as they are


@pytest.mark.parametrize("name", REFUSED)
def test_another_function_is_refused_and_named(name):
    more, problem = REFUSED[name]
    with pytest.raises(ValueError, match=problem):
        check_forward(config_of(name, **more))


@pytest.mark.parametrize("name", ["Mistral, a window", "Qwen2, a window", "Gemma3Text"])
def test_a_window_that_is_left_out_is_found(name, monkeypatch):
    def blind(*args, sliding_window=None, **more):
        return varlen_attention(*args, **more)

    monkeypatch.setitem(AttentionInterface._global_mapping, "varlen", blind)
    with pytest.raises(ValueError, match="'sliding_window': 4096"):
        check_forward(config_of(name, **PASS[name]))


def test_attention_that_looks_ahead_is_refused(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaAttention

    init = LlamaAttention.__init__

    def both_ways(self, *args, **more):
        init(self, *args, **more)
        self.is_causal = False

    monkeypatch.setattr(LlamaAttention, "__init__", both_ways)
    with pytest.raises(ValueError, match="its attention is not causal"):
        check_forward(config_of("Llama"))


def test_a_model_that_is_refused_ends_the_program_before_its_weights_are_read(tmp_path):
    config_of("Granite", logits_scaling=8.0).save_pretrained(tmp_path)  # no weights there
    with pytest.raises(
        SystemExit, match=rf"{tmp_path} \(granite\) cannot be trained: .*logits_scal"
    ):
        load_policy(str(tmp_path), False)


def test_real_weights_keep_their_function_with_a_window_shorter_than_a_row(tmp_path):
    from reagent.policy import Sequence, collate

    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config_of("Mistral", sliding_window=3))
    hf.save_pretrained(tmp_path)
    rows = [Sequence(torch.randint(64, (n,)).tolist(), [0] + [1] * (n - 1)) for n in (9, 3, 9, 2)]
    got, _ = load_policy(str(tmp_path), False)(collate(rows, (), torch.device("cpu")))
    expected = []
    for row in rows:
        ids = torch.tensor(row.ids)
        logps = hf.eval()(ids[None]).logits[0, :-1].log_softmax(-1)
        expected.append(logps.gather(1, ids[1:, None])[:, 0])
    assert torch.allclose(got, torch.cat(expected), atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_windowed_gradient_is_that_of_dense_attention(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    torch.manual_seed(0)
    lengths, window, dtype = [7, 7, 4, 12], 5, torch.bfloat16 if device == "cuda" else torch.float
    options, total = dict(device=device, dtype=dtype, requires_grad=True), sum(lengths)
    q = torch.randn(1, 4, total, 64, **options)
    k, v = (torch.randn(1, 2, total, 64, **options) for _ in range(2))
    rows = row_ends(lengths, torch.device(device))
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.cat([torch.arange(n) for n in lengths])
    back = at[:, None] - at[None]
    seen = ((row[:, None] == row[None]) & (back >= 0) & (back < window)).to(device)
    scores = q.float() @ k.float().repeat_interleave(2, 1).mT / 8
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    dense = (weights @ v.float().repeat_interleave(2, 1)).transpose(1, 2)
    options = dict(kernel="torch", sliding_window=window)
    packed, _ = varlen_attention(torch.nn.Module(), q, k, v, None, **options, **rows)
    near = 1e-5 if device == "cpu" else 3e-2
    assert torch.allclose(packed.float(), dense, atol=near)
    expected = torch.autograd.grad(dense.square().sum(), (q, k, v))
    got = torch.autograd.grad(packed.float().square().sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=20 * near) for a, b in zip(got, expected))
