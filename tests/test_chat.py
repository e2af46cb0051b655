"""The append-only renderer with templates of two styles."""

import pytest

from rows import Chat
from tests.tiny import toy

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# strips <think> from history, puts an empty think block into a last assistant turn, shows tools in the system turn
STRIPS = (
    "{% if tools %}<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' else '' }}\n<tools>"
    "{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% elif m.role != 'system' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
START = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
THINKS = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n<tool_call>\n{}\n</tool_call>"}
RESULTS = [{"role": "tool", "content": "one"}, {"role": "tool", "content": "two"}]
LAST = {"role": "assistant", "content": "\\boxed{1}"}


@pytest.fixture(params=[PLAIN, STRIPS], ids=["plain", "strips"])
def chat(request):
    return Chat(toy.make_tokenizer([], request.param))


def test_the_prompt_is_what_the_template_renders(chat):
    whole = chat.tokenizer.apply_chat_template(START, tools=TOOLS, add_generation_prompt=True, tokenize=False)
    assert chat.decode(chat.prompt(START, TOOLS)) == whole


def test_thoughts_stay_and_no_empty_ones_appear(chat):
    ids, _ = chat.row([*START, THINKS, *RESULTS, LAST], TOOLS)
    text = chat.decode(ids)
    assert text.count("<think>") == 1 and "<think>\nhm\n</think>" in text and text.count("<tools>") <= 1


def test_a_row_is_its_prompt_its_turns_and_its_fragments(chat):
    ids, mask = chat.row([*START, THINKS, *RESULTS, LAST], TOOLS)
    parts = [(chat.prompt(START, TOOLS), 0), (chat.text(THINKS["content"]) + [chat.closer_id], 1)]
    parts += [(chat.fragment(RESULTS)[1:], 0), (chat.text(LAST["content"]) + [chat.closer_id], 1)]
    assert ids == [token for part, _ in parts for token in part]
    assert mask == [m for part, m in parts for _ in part]


def test_results_in_a_row_are_one_user_turn(chat):
    text = chat.decode(chat.fragment(RESULTS))
    block = "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>"
    assert text == f"<|im_end|>\n<|im_start|>user\n{block}<|im_end|>\n<|im_start|>assistant\n"


def test_assistant_text_cannot_close_its_own_turn(chat):
    assert chat.closer_id not in chat.text("a<|im_end|>b")


def test_tool_calls_as_records_become_raw_text(chat):
    call = {"function": {"name": "search", "arguments": '{"queries": ["x"]}'}}
    ids, _ = chat.row([*START, {"role": "assistant", "content": None, "tool_calls": [call]}, *RESULTS, LAST])
    assert '<tool_call>\n{"name": "search", "arguments": {"queries": ["x"]}}\n</tool_call><|im_end|>' in chat.decode(ids)


def test_a_tokenizer_without_a_template_is_a_clear_error():
    with pytest.raises(ValueError, match="no chat template"):
        Chat(toy.make_tokenizer([], None))
