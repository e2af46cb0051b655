"""Chat templates in the manner of many families, and a byte-level BPE with merges to render them
with. No torch.
"""

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[END]", "<|user|>", "<|assistant|>")
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
_SYSTEM = (
    "{% set has_system = messages[0].role == 'system' %}"
    "{% if has_system or tools %}<|im_start|>system{{ '\\n' }}{% if has_system %}{{ "
    "messages[0].content }}{% endif %}"
    "{% if tools %}" + _TOOLS + "{% endif %}<|im_end|>{{ '\\n' }}{% endif %}"
)
_CALLS = (
    "{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}"
    "<tool_call>{{ '\\n' }}{{ '{\"name\": ' }}{{ call.function.name | tojson }}"
    "{{ ', \"arguments\": ' }}{{ call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}"
    "{% endfor %}"
)
# results in a row are one user turn, as Qwen has them
_RESULTS = (
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>{{ '\\n' }}{% endif %}"
)

# ChatML and nothing else: no tools
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + _GENERATE
)

# a result is a turn of its own, of role tool
TOOL_TURNS = (
    _SYSTEM
    + "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    + _CALLS
    + "<|im_end|>\n{% endif %}{% endfor %}"
    + _GENERATE
)

# as Qwen3: strips <think> from history, puts an empty think block into a last assistant turn, joins
# tool results
THINKING = (
    _SYSTEM + "{% for m in messages %}"
    "{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>{{ '\\n' }}"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant{{ '\\n' }}"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ "
    "m.content.split('</think>')[-1].lstrip('\\n') }}" + _CALLS + "<|im_end|>{{ '\\n' }}"
    "{% elif m.role == 'tool' %}" + _RESULTS + "{% endif %}{% endfor %}" + _GENERATE
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
    "{% for m in messages %}{% if m.role == 'tool' %}" + _RESULTS + "{% elif m.role != 'system' %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}"
    + _CALLS
    + "<|im_end|>{{ '\\n' }}{% endif %}{% endfor %}"
    + _GENERATE
)

# as Qwen3.5 and Qwen3-Coder: calls in XML
XML = THINKING.replace(
    _CALLS,
    "{% for call in m.tool_calls or [] %}"
    "{{ '\\n' if not loop.first else '\\n\\n' if m.content else '' }}"
    "<tool_call>{{ '\\n<function=' }}{{ call.function.name }}>{{ '\\n' }}"
    "{% for key, value in call.function.arguments | items %}<parameter={{ key }}>{{ '\\n' }}"
    "{{ value if value is string else value | tojson }}{{ '\\n</parameter>\\n' }}{% endfor %}"
    "</function>{{ '\\n</tool_call>' }}{% endfor %}",
)
# as Nemotron 3: a line end behind the last call
XML_TRAIL = XML.replace(
    "{{ '\\n</tool_call>' }}{% endfor %}",
    "{{ '\\n</tool_call>' }}{% if loop.last %}{{ '\\n' }}{% endif %}{% endfor %}",
)
# as Hermes 2 Pro: wants a list of tools, drops what a turn says beside its calls
WANTS_TOOLS = TOOL_TURNS.replace(
    "{{ m.content }}" + _CALLS,
    "{% if not m.tool_calls %}{{ m.content }}{% endif %}" + _CALLS.replace("m.content or ", ""),
).replace("{% if has_system or tools %}", "{% for _ in tools %}{% endfor %}{% if true %}")


def _in_format(call: str, result: str = "{{ m.content }}") -> str:
    """ChatML with calls and results of another format."""
    calls = "{% for call in m.tool_calls or [] %}" + call + "{% endfor %}"
    said = "{{ m.content }}" + _CALLS
    return TOOL_TURNS.replace(
        said, "{% if m.role == 'tool' %}" + result + "{% else %}{{ m.content }}{% endif %}" + calls
    )


_NAME, _ARGUMENTS = "{{ call.function.name }}", "{{ call.function.arguments | tojson }}"
# formats that are not known here, by the family that has them
FOREIGN = {
    "llama": _in_format('{"name": "' + _NAME + '", "parameters": ' + _ARGUMENTS + "}"),
    "mistral": _in_format("[TOOL_CALLS]" + _NAME + "[ARGS]" + _ARGUMENTS),
    "glm": _in_format(
        "<tool_call>" + _NAME + "{% for k, v in call.function.arguments | items %}{{ '\\n' }}"
        "<arg_key>{{ k }}</arg_key><arg_value>{{ v | tojson }}</arg_value>{% endfor %}</tool_call>"
    ),
    "gemma": _in_format("<|tool_call>call:" + _NAME + "{{ '{' }}" + _ARGUMENTS + "}<tool_call|>"),
    "pythonic": _in_format("[" + _NAME + "({{ call.function.arguments.note | tojson }})]"),
    "wrapped": _in_format(
        '[CALLS]<tool_call>{"name": "' + _NAME + '", "arguments": ' + _ARGUMENTS + "}</tool_call>"
    ),
}

# no token ends an assistant turn, the next role does, as in GLM
NO_CLOSER = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# a turn begins with a channel that the generation prompt leaves to the model, as in gpt-oss
CHANNELS = PLAIN.replace(
    "<|im_start|>{{ m.role }}\n",
    "<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<|final|>{% endif %}\n",
)
# no system role, as in Gemma and the first Mistral
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + PLAIN
)

TEXT = """The river Nile is 6650 km long.\n\nSo the answer is \\boxed{6650}.
{"name": "search", "arguments": {"queries": ["how long is the Nile?"], "top_k": 3}}
Results for "Nile":\n1. Nile (doc:Nile)\n<p>A river in Africa.</p>\n</div>\n>\n<\n"""


def make_tokenizer(template: str | None, eos: str = "<|im_end|>", normalizer=None):
    """As Qwen's: byte-level BPE; control tokens are special, the tags are added but not special.
    With a normalizer they are looked for in the text that it made."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "assistant user system tool response think"] * 2, trainer)
    return _with_controls(tokenizer, template, eos, normalizer is not None)


def make_sentencepiece(template: str, scheme: str = "always"):
    """As Llama 2's and Mistral's: a piece for a space begins every text that is encoded alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "\u2581", *(f"<0x{i:02X}>" for i in range(256)), *map(chr, range(33, 127))]
    pieces += ["\u2581a", "\u2581the", "\u2581search"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("\u2581", "a")]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return _with_controls(tokenizer, template, "<|im_end|>", False)


def make_unigram(template: str, controls: tuple[str, ...]):
    """As XGLM's: the likeliest pieces of a vocabulary that may hold control strings."""
    from tokenizers import Tokenizer, decoders, models

    pieces = [("<unk>", -20.0), *((char, -10.0) for char in map(chr, range(32, 127)))]
    pieces += [("\n", -10.0), *((text, 0.0) for text in controls)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.decoder = decoders.Fuse()
    return _with_controls(tokenizer, template, "<|im_end|>", False)


def _with_controls(tokenizer, template: str | None, eos: str, normalized: bool):
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    for names, special in ((CONTROL, True), (TAGS, False)):
        added = [AddedToken(text, special=special, normalized=normalized) for text in names]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, chat_template=template
    )
