"""Chat templates in the manner of three families, and a byte-level BPE with merges to render them
with. No torch.
"""

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[END]")
TAGS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<|fim_prefix|>",
)

_GENERATE = "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
_TOOLS = (
    "{{ '\\n' }}<tools>{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '\\n' "
    "}}</tools>"
)

# ChatML and nothing else: no tools, a tool turn is a turn of role "tool"
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + _GENERATE
)

# as Qwen3: strips <think> from history, puts an empty think block into a last assistant turn, joins
# tool results
THINKING = (
    "{% set has_system = messages[0].role == 'system' %}"
    "{% if has_system or tools %}<|im_start|>system{{ '\\n' }}{% if has_system %}{{ "
    "messages[0].content }}{% endif %}"
    "{% if tools %}" + _TOOLS + "{% endif %}<|im_end|>{{ '\\n' }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>{{ '\\n' }}"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant{{ '\\n' }}"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ "
    "m.content.split('</think>')[-1].lstrip('\\n') }}"
    "<|im_end|>{{ '\\n' }}"
    "{% elif m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>{{ '\\n' }}{% endif %}"
    "{% endif %}{% endfor %}" + _GENERATE
)

# as Qwen3-Thinking: the generation prompt opens the thoughts of every turn
OPENED = THINKING.replace(
    "<|im_start|>assistant{{ '\\n' }}{% endif %}",
    "<|im_start|>assistant{{ '\\n<think>\\n' }}{% endif %}",
)

# as Qwen2.5: a system text of its own where there is none, and tools repeated in every rendering
DEFAULT_SYSTEM = (
    "<|im_start|>system{{ '\\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}Be of use.{% endif %}"
    "{% if tools %}" + _TOOLS + "{% endif %}<|im_end|>{{ '\\n' }}"
    "{% for m in messages %}{% if m.role != 'system' %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\\n' }}{% endif %}{% endfor %}"
    + _GENERATE
)

TEXT = """The river Nile is 6650 km long.\n\nSo the answer is \\boxed{6650}.
{"name": "search", "arguments": {"queries": ["how long is the Nile?"], "top_k": 3}}
Results for "Nile":\n1. Nile (doc:Nile)\n<p>A river in Africa.</p>\n</div>\n>\n<\n"""


def make_tokenizer(template: str | None, eos: str = "<|im_end|>"):
    """As Qwen's: byte-level BPE; control tokens are special, the tags are added but not special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "assistant user system tool response think"] * 2, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in CONTROL]
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, chat_template=template
    )
