"""The reward of a judgment, leaks, the report and the rows, against worked examples and scipy-free
oracles.
"""

import asyncio
import math
import random

import pytest
import torch

import train_rrm
from data.report.markdown import report_table
from reagent import critiques, reward_model
from reagent.chat import Chat
from reagent.engines import EngineConfig, Sample
from reagent.policy import normalised
from reagent.reward_model import Judgment, RewardModelConfig
from results import judging
from tests.helpers import templates
from tests.helpers.judge_server import judge_server
from tests.helpers.tiny import apart, toy
from tests.loss.test_critiques import WORDS

ROW = {
    "question": "Who wrote it, Bob or somebody else?",
    "trajectory": "[assistant]\nI asked for Bob. \\boxed{Bob}\n[tool]\nSee the page of Cleo.",
    "score": 0.8,
    "correct": True,
    "critique": "The page of Cleo was never opened.",
    "answer": ["Ada Byron"],
}
ABOUT_OSLO = {"question": "How far is Oslo?", "critique": "Nothing on Oslo was found."}
CFG = train_rrm.Config()
THINK = "The agent did not open the page that its search had found."


def judgment(score, critique="You should open the page of Cleo.", think=THINK):
    return Judgment(think, critique, score)


def earned(found, **changes):
    return train_rrm.judgment_reward(found, ROW | changes, CFG)


@pytest.mark.parametrize(
    "found, changes, value",
    [
        (judgment(0.8), {}, (0.45 + 0.5 * 0.96 + 0.25) / 1.2),
        (judgment(0.3), {}, (0.45 * 0.5 + 0.5 * 0.51 + 0.25) / 1.2),
        (judgment(0.3), {"correct": None}, (0.45 * 0.5 + 0.25) / 0.7),
        (judgment(0.3), {"score": None}, (0.5 * 0.51 + 0.25) / 0.75),
        (judgment(0.3), {"score": None, "correct": False}, (0.5 * 0.91 + 0.25) / 0.75),
        (judgment(0.8, "You should have read some other page."), {}, (0.93 + 0.125) / 1.2),
        (judgment(0.8, "Bob did not open the page of Cleo."), {}, (0.93 + 0.25 * 5 / 6) / 1.2),
        (judgment(0.8, "The page of Cleo names Ada  Byron."), {}, 0.5 * (0.93 + 0.25) / 1.2),
        (judgment(0.8, "It was somebody else: Cleo"), {"answer": "somebody else"}, 1.18 / 1.2),
        # twice as long as a critique may be
        (judgment(0.8, " ".join(["Cleo", *WORDS[:799]])), {}, (0.93 + 0.125) / 1.2),
        # what only the question names
        (judgment(0.8, "You should ask about Oslo."), ABOUT_OSLO, 1.18 / 1.2),
    ],
)
def test_reward_of_a_judgment(found, changes, value):
    assert earned(found, **changes) == pytest.approx(0.1 + 0.9 * value)


def test_any_valid_judgment_beats_a_broken_format():
    worst = judgment(0.0, "Ada Byron", ".")
    for changes in ({"score": 1.0}, {"score": 1.0, "correct": None}, {"score": None}):
        assert earned(worst, **changes) >= train_rrm.VALID > earned(None, **changes) == 0


@pytest.mark.parametrize("score", [0.0, 0.3, 0.5, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("correct", [True, False])
def test_no_optimum_of_the_score_sits_on_a_cliff(score, correct):
    """The best score is the annotated one, moved to the side that correctness says; a small step
    away from it costs little.
    """
    grid = [i / 1000 for i in range(1001)]
    rewards = [earned(judgment(s), score=score, correct=correct) for s in grid]
    assert max(abs(a - b) for a, b in zip(rewards, rewards[1:])) < 0.0012
    best = max(score, 0.55) if correct else min(score, 0.45)
    assert grid[rewards.index(max(rewards))] == pytest.approx(best, abs=6e-4)


def toy_rows(count=60):
    rng = random.Random(0)
    return [toy.rrm_row(rng, i) for i in range(count)]


def mean_reward(judge, rows):
    return sum(train_rrm.judgment_reward(judge(row), row, CFG) for row in rows) / len(rows)


def honest(row):
    """Like a trained judge: a score off by .1, one critique in six names another place."""
    wrong = sum(map(ord, row["id"])) % 6 == 0
    critique = f"{toy.STOPPED}Xena." if wrong else row["critique"]
    return Judgment(row["think"], critique, abs(row["score"] - 0.1))


@pytest.mark.parametrize(
    "cheat",
    [
        lambda row: Judgment(row["think"], row["critique"], 0.5),
        lambda row: Judgment("Ada: no.", f"{toy.STOPPED}Ada.", 0.15),
        lambda row: Judgment(row["think"], ".", row["score"]),
        lambda row: Judgment(row["think"], "\u200b", row["score"]),
        lambda row: Judgment(row["think"], "x" * 3000, row["score"]),
        lambda row: Judgment(row["think"], "x " * 1500, row["score"]),
        lambda row: Judgment(row["think"], row["critique"] * 100, row["score"]),
        lambda row: Judgment(row["think"], "Look at it again with more care.", row["score"]),
        lambda row: Judgment("\u200b", row["critique"], row["score"]),
        lambda row: Judgment(".", row["critique"], row["score"]),
        lambda row: Judgment(row["think"] * 200, row["critique"], row["score"]),
        lambda row: None,  # what parse_judgment makes of an empty analysis, and of one that was cut
    ],
    ids=(
        "hedge constant dot zero-width x x-words long generic invisible-analysis dot-analysis "
        "endless-analysis broken"
    ).split(),
)
def test_an_honest_judgment_earns_more_than_a_cheat(cheat):
    rows = toy_rows()
    assert mean_reward(honest, rows) > mean_reward(cheat, rows) + 0.02


def test_an_empty_analysis_and_one_that_was_cut_are_broken_formats():
    chat = Chat(toy.make_tokenizer([]))
    text = "<think>{}</think><critique>look again</critique><score>0.5</score>"
    for think, reason, valid in (("a", "stop", True), (" ", "stop", False), ("a", "length", False)):
        sample = Sample(chat.text(text.format(think)), [], reason)
        assert (train_rrm.read_judgment(chat, sample) is not None) is valid


LEAKS = [  # critique, gold, is it a leak?
    ("the answer is Paris.", "Paris", True),
    ("the answer is\nparis", "Paris", True),
    ("the answer is parisian", "Paris", False),  # whole words
    ("Paris's museum", "Paris", True),
    ("It was Ada  Byron.", "Ada Byron", True),
    ("It was **Ada** Byron", "Ada Byron", True),
    ("Beatles!", "The Beatles", True),
    ("tell us a story", "USA", False),
    ("the U.S.A. is", "USA", True),
    ("the T S Eliot poem", "T.S. Eliot", True),
    ("an e-mail", "email", True),
    # scripts without spaces between words
    ("答案是北京大学。", "北京大学", True),
    ("答えは東京タワーです", "東京タワー", True),
    ("정답은 서울이다", "서울", True),
    ("คำตอบคือกรุงเทพ", "กรุงเทพ", True),
    ("答案是清华大学。", "北京大学", False),
    # numbers, by value
    ("it is 1234", "1,234", True),
    ("it is 1,234.0", "1234", True),
    ("it is 1 234", "1234", True),
    ("it is 1{,}234 m", "1234", True),
    ("it is 12.5", "12.50", True),
    ("it is 1235", "1,234", False),
    ("step 1, 234 rows", "1234", False),
    ("it was 1969", "1969", True),
    ("in the 1960s", "1960", False),
    ("1234km", "1,234 km", True),
    ("12 km", "12km", True),
    ("it is 1/2", "\\frac{1}{2}", True),
    ("so $\\dfrac12$", "1/2", True),
    ("it is 0.5.", "\\frac{1}{2}", True),
    ("it is ½", "0.5", True),
    ("it is 1/3", "1/2", False),
    ("it is 3 1/2", "3½", True),
    ("x + 1", "x+1", True),
    ("x - 1", "x+1", False),
    ("(1, 2)", "(1,2)", True),
    # other forms of the same letters
    ("Ｐａｒｉｓ", "Paris", True),
    ("𝐏𝐚𝐫𝐢𝐬", "Paris", True),
    ("P\u200bar\u00adis", "Paris", True),
    ("Sa\u0303o Paulo", "São Paulo", True),
    ("Sao Paulo", "São Paulo", True),
    ("Lodz", "Łódź", True),
    ("Strasse", "Straße", True),
    ("P\u0430ris", "Paris", True),  # a Cyrillic a
    ("١٩٦٩", "1969", True),
    ("it is a P a r i s", "Paris", True),
    ("p-a-r-i-s", "Paris", True),
    ("A d a B y r o n", "Ada Byron", True),
    # what a critique may say
    ("no", "no", False),
    ("a yes, but", "Yes.", False),
    ("B is right", "B", False),
    ("option B", "(B)", False),
    ("use 42", "42", False),
    ("use 12", "$12$", False),
    ("step 12", "$12", False),
    ("it costs $12", "$12", True),
    ("50 of them", "50%", False),
    ("half, so 50 percent", "50%", True),
    ("step 5", "-5", False),
    ("lines 3-5", "-5", False),
    ("it is minus 5", "-5", True),
    ("grade C", "C++", False),
    ("write it in C++", "C++", True),
    ("the value $1,234", "1234", True),
    ("infinite, so ∞", "∞", True),
]


@pytest.mark.parametrize("critique, gold, leak", LEAKS)
def test_leaks_are_the_answers_words_whatever_their_form(critique, gold, leak):
    assert critiques.leaks(critique, [gold], "q", "t") is leak


def test_what_question_or_trajectory_say_in_any_form_is_no_leak():
    assert not critiques.leaks("It is Paris", ["Paris"], "is it PARIS?", "t")
    assert not critiques.leaks("It is 1234", ["1,234"], "q", "[tool]\n1 234 people")
    assert critiques.leaks("It is Paris or Rome", ["Paris", "Rome"], "q", "perhaps Paris")


def test_names_are_those_of_the_trail_and_a_critique_has_its_own():
    trail = critiques.names(
        'When was it?\n[assistant]\nThe search: "Rome"\n[tool]\nIt leads to Nile.'
    )
    assert trail == {"rome", "nile"}
    assert critiques.named("The search of Rome and Oslo was enough.", trail) == {"rome"}
    assert critiques.named("Look at rome once more, and at nile.", trail) == set()
    assert critiques.named("再查看北京大学", critiques.names("q\n北京大学很大")) == {"北京大学"}


def test_a_row_says_its_answer_as_a_text_a_number_or_a_list():
    for answer, golds in ((None, []), ("a", ["a"]), (7, ["7"]), (["a", 7], ["a", "7"])):
        assert reward_model.golds_of({"answer": answer}) == golds


def test_a_judgment_in_one_text_has_score_and_critique():
    text = "<think>a</think><critique>c</critique><score>0.5</score>"
    own = {"score": 0.9, "critique": "of the row"}
    assert reward_model.annotation({"judgment": text} | own) == (0.5, "c")
    assert reward_model.target_text({"judgment": text} | own) == text
    exact = reward_model.target_text({"think": "a", "critique": "c", "score": 0.26})
    assert exact == text.replace("0.5", "0.26")
    assert reward_model.annotation({"score": 0.2}) == (0.2, None)


def test_group_advantages_are_centred_and_scaled_in_their_own_group():
    rewards = torch.tensor([[0.0, 1.0], [0.4, 0.6], [1.01, 1.01]])
    got = normalised(rewards, eps=0.0)
    half = 0.5**0.5  # of two values the unbiased std is their distance times that
    want = torch.tensor([[-half, half], [-half, half], [0.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(got, want, atol=1e-6)
    assert not normalised(torch.full((2, 3), 0.7)).any()


@pytest.mark.parametrize("weight", [dict(leak_penalty=1.1), dict(critique_weight=-1.0)])
def test_a_weight_that_lets_a_broken_judgment_win_is_named(weight):
    (key,) = weight
    with pytest.raises(SystemExit, match=f"^{key} = "):
        train_rrm.main(train_rrm.Config(**weight))


def test_auc_is_the_share_of_ordered_pairs():
    rng = random.Random(0)
    scores, labels = (
        [rng.choice((0, 0.5, 1)) for _ in range(60)],
        [rng.random() < 0.4 for _ in range(60)],
    )
    pairs = [(a, b) for a, x in zip(scores, labels) for b, y in zip(scores, labels) if x and not y]
    assert judging.auc(scores, labels) == pytest.approx(
        sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    )


def test_rank_correlation_sees_order_only():
    x = [1, 2, 3, 4, 5]
    assert judging.rank_correlation(x, [v**3 for v in x]) == pytest.approx(1)
    assert judging.rank_correlation([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(
        4.5 / math.sqrt(22.5)
    )
    assert math.isnan(judging.rank_correlation(x, [1, 1, 1, 1, 1]))


def test_the_report_counts_invalid_judgments_and_calibrates():
    rows = [{**ROW, "correct": bool(i % 2)} for i in range(4)]
    report = judging.judgment_report(
        [judgment(0.95), judgment(0.95), judgment(0.15), None], rows, [10, 10, 10, 10]
    )
    assert report["valid"] == 0.75
    assert report["calibration/0.9"] == [0.5, 2] and report["calibration/0.1"] == [0.0, 1]
    assert report["ece"] == pytest.approx((2 * 0.45 + 0.15) / 3, abs=1e-4)
    assert report["mae"] == pytest.approx((0.15 + 0.15 + 0.65) / 3, abs=1e-4)
    assert report["brier"] == pytest.approx((0.95**2 + 0.05**2 + 0.15**2) / 3, abs=1e-4)


def test_the_report_says_what_no_row_can_tell():
    row = {"question": "q", "trajectory": "t", "correct": True}
    report = judging.judgment_report([judgment(0.9)], [row], [5])
    assert report["critique_leaks"] == report["mae"] == "unknown" and report["brier"] == 0.01
    assert "unknown" in report_table(report)
    leaking = [row, row | {"answer": "Cleo"}]
    assert judging.judgment_report([judgment(0.9)] * 2, leaking, [5])["critique_leaks"] == 1.0


def test_the_report_tells_critiques_of_their_trajectory_from_those_that_fit_any():
    rows = toy_rows()
    own = [Judgment(row["think"], row["critique"], 0.5) for row in rows]
    moved = judging.judgment_report(own[1:] + own[:1], rows, [])
    told = judging.judgment_report(own, rows, [])
    assert told["critique/named"] == told["critique/names_f1"] == told["critique/prose"] == 1.0
    assert moved["critique/named"] < 0.4 and told["critique/named_in_next"] < 0.4
    assert moved["critique/names_f1"] < 0.3
    bare = [{key: row[key] for key in row if key not in ("think", "critique")} for row in rows]
    wordless = [Judgment("So it is.", "look again at all of it.", 0.5)] * len(bare)
    both = judging.judgment_report(own + wordless, rows + bare, [])
    assert both["critique/names_f1"] == 1.0 and both["critique/named"] == 0.5  # none to agree with


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"critique": "c", "score": 0.5},
            "SFT needs 'think'; found the keys ['critique', 'question', 'score', 'trajectory']",
        ),
        ({"think": "a", "critique": "<score>1</score>", "score": 0.5}, "the judgment is not valid"),
        ({"judgment": "a fine attempt"}, "the judgment is not valid"),
        ({"judgment": "<think>a</think><critique>c</critique><score>0.5</score>"}, None),
    ],
)
def test_a_row_without_a_judgment_to_learn_is_told_before_sft(row, told):
    assert reward_model.check_judged_row({"question": "q", "trajectory": "t", **row}) == told


CHAT = Chat(toy.make_tokenizer([]))


def test_a_row_that_is_too_long_is_left_out_and_long_tool_results_are_shortened_first():
    cfg = train_rrm.Config(max_context=3000, max_judgment_tokens=100, max_tokens_per_row=3000)
    row = {"question": "q", "think": "a", "critique": "c", "score": 0.5}
    said = {"role": "assistant", "content": "word " * 2000}
    seen = {"role": "tool", "content": "fact " * 2000}
    assert train_rrm.sft_row(CHAT, row | {"trajectory": [said]}, cfg) is None
    fitted = train_rrm.sft_row(
        CHAT, row | {"trajectory": [seen, {"role": "assistant", "content": "the answer"}]}, cfg
    )
    assert len(fitted.ids) <= 3000 and "the answer" in CHAT.decode(fitted.ids)


@pytest.mark.parametrize("word", ["fact ", "事实"])  # of five tokens and of six
def test_a_prompt_leaves_room_for_the_longest_judgment(word):
    cfg = train_rrm.Config(max_context=4000, max_judgment_tokens=1500)
    for words in range(100, 2000, 190):
        seen = {"role": "tool", "content": word * words}
        ids = train_rrm.judge_ids(CHAT, {"question": "q", "trajectory": [seen]}, cfg)
        assert 1000 < len(ids) <= 2500


def test_a_row_counts_with_its_judgment():
    row = {"question": "q", "trajectory": "t", "think": "a", "critique": "c", "score": 0.5}
    whole = len(train_rrm.sft_row(CHAT, row, CFG).ids)
    for most, left_out in ((whole, 0), (whole - 1, 1)):
        cfg = train_rrm.Config(max_tokens_per_row=most)
        fitting, total, line = train_rrm.sft_batch(CHAT, [row], cfg)
        assert line == {"too_long": left_out} and len(fitting) == 1 - left_out
        assert bool(total) is not bool(left_out)


def test_a_template_that_opens_the_thoughts_changes_neither_the_verdict_nor_its_weight():
    chat = Chat(templates.make_tokenizer(templates.OPENED), tools=False)
    row = toy.rrm_row(random.Random(0), 0)
    text = chat.sampled(reward_model.target_text(row))
    assert chat.opened and not text.startswith("<think>")
    cfg = train_rrm.Config(max_context=4000, max_judgment_tokens=300, verdict_weight=3.0)
    weights = train_rrm.sft_row(chat, row, cfg).columns["weight"]
    plain = len(chat.text(text.partition(" Found ")[0]))
    assert weights == [1.0] * plain + [3.0] * (len(weights) - plain)
    sample = Sample([*chat.text(text), chat.closer_id], [], "stop")
    found = train_rrm.read_judgment(chat, sample)
    assert found.score == row["score"] and found.think == row["think"]


@pytest.mark.parametrize("system", ["You are Agent-RRM.", ""])
def test_the_prompts_of_released_rows_are_what_the_judge_trains_on_and_is_asked_with(
    tmp_path, system
):
    """As data/reagent/prepare.py writes them; a question that names a place of the form is only a
    question."""
    prompt, form = tmp_path / "system.txt", tmp_path / "request.txt"
    prompt.write_text(system)
    form.write_text("Question: {question}\n\nAgent Trajectory: {trajectory}")
    files = dict(prompt_file=str(prompt), request_file=str(form))
    row = {
        "question": "is {trajectory} one?",
        "trajectory": [{"role": "assistant", "content": "x"}],
    }
    text = reward_model.trajectory_text(row["trajectory"])
    user = f"Question: is {{trajectory}} one?\n\nAgent Trajectory: {text}"
    messages = [{"role": "system", "content": system}] * bool(system)
    messages.append({"role": "user", "content": user})
    ids = train_rrm.judge_ids(CHAT, row, train_rrm.Config(**files))
    assert ids == CHAT.prompt(messages, None)
    with judge_server(whole=True) as (url, requests):
        config = RewardModelConfig(url, max_tokens=400, max_context=4000, **files)
        rrm = reward_model.open_rrm(config, CHAT, engine=EngineConfig("hf"))
        assert asyncio.run(rrm(row["question"], row["trajectory"], (0,)))
    assert requests[0]["messages"] == messages


def test_a_form_of_the_request_that_lacks_a_place_is_named(tmp_path):
    form = tmp_path / "request.txt"
    form.write_text("Question: {question}")
    with pytest.raises(
        SystemExit, match="request.txt: {question} and {trajectory} stand in it once"
    ):
        reward_model.read_rrm_prompt("", str(form))
    with pytest.raises(SystemExit, match="no prompt file nowhere.txt: data/reagent/prepare.py"):
        reward_model.read_rrm_prompt("nowhere.txt", "")
    (tmp_path / "prepare.py").touch()  # the script beside it made it, as that of the atlas
    with pytest.raises(SystemExit, match=f"none.txt: {tmp_path}/prepare.py writes"):
        reward_model.read_rrm_prompt(f"{tmp_path}/none.txt", "")


def test_loss_and_gradient_of_judgments_equal_a_loop_over_tokens():
    torch.manual_seed(0)
    logps = torch.randn(12, dtype=torch.float64, requires_grad=True)
    old = logps.detach() + 0.4 * torch.randn(12, dtype=torch.float64)
    columns = {"sampler_logps": old, "advantage": torch.randn(12, dtype=torch.float64)}
    columns["weight"] = torch.rand(12, dtype=torch.float64)
    loss = train_rrm.clipped_loss(logps, columns, clip_low=0.2, clip_high=0.34)
    (gradient,) = torch.autograd.grad(loss, logps)
    total, slopes = 0.0, []
    for t in range(12):
        a, w = columns["advantage"][t], columns["weight"][t]
        r = math.exp(logps[t].item() - old[t].item())
        beyond = r > 1.34 if a > 0 else r < 0.8
        total -= w * a * ((1.34 if a > 0 else 0.8) if beyond else r)
        slopes.append(0.0 if beyond else -w * a * r)
    assert loss.item() == pytest.approx(total.item()) and 0 < slopes.count(0.0) < 12
    assert torch.allclose(gradient, torch.tensor(slopes, dtype=torch.float64))


def grpo_batch(texts_by_row, cut=(), **changes):
    """(sequences, metrics, requests) of a batch in which these texts are sampled, row by row."""
    asked, texts = [], [text for texts in texts_by_row for text in texts]

    def sample(prompts, seeds, temperature):
        asked.extend(zip(prompts, seeds, [temperature] * len(seeds)))
        ids = [[*CHAT.text(text), CHAT.closer_id] for text in texts]
        logps = [[-0.1 * i - 0.01 * t for t in range(len(of))] for i, of in enumerate(ids)]
        reasons = ["length" if i in cut else "stop" for i in range(len(ids))]
        return [Sample(*each) for each in zip(ids, logps, reasons)]

    rows = [ROW | {"question": f"Who wrote page {i}?"} for i in range(len(texts_by_row))]
    rows[1:1] = [ROW | {"question": "too long " * 2000}]
    settings = dict(group_size=len(texts_by_row[0]), max_context=4000, max_judgment_tokens=300)
    cfg = train_rrm.Config(**settings | changes)
    sequences, total, line = train_rrm.grpo_batch(CHAT, rows, sample, 3, cfg)
    assert total == 1.0 and line["too_long"] == 1
    return [row for tree in sequences for row in apart(tree)], line, asked


def judgment_of(score, words="You should open the page of Cleo."):
    return toy.judgment_text(THINK, words, score)


def test_each_judgment_is_trained_with_its_own_advantage_weight_and_logps():
    texts = [[judgment_of(0.8), "broken"], [judgment_of(0.5)] * 2, [judgment_of(0.1), "<think>"]]
    sequences, line, asked = grpo_batch(texts)
    assert line["valid"] == 4 / 6 and line["pools/dropped"] == pytest.approx(1 / 3)
    rewards = [[earned(judgment(s)), 0.0] for s in (0.8, 0.1)]
    assert line["reward"] == pytest.approx(
        (sum(map(sum, rewards)) + 2 * earned(judgment(0.5))) / 6, abs=1e-6
    )
    wanted = normalised(torch.tensor(rewards, dtype=torch.float32)).flatten()
    places = [0, 1, 4, 5]  # the group without spread is left out, also of the weights
    for sequence, place, advantage in zip(sequences, places, wanted.tolist(), strict=True):
        prompt, text = asked[place][0], texts[place // 2][place % 2]
        new = [*CHAT.text(text), CHAT.closer_id]
        assert f"page {place // 2}?" in CHAT.decode(prompt)
        assert sequence.ids == prompt + new
        assert sequence.mask == [0] * len(prompt) + [1] * len(new)
        assert sequence.columns["weight"] == [1 / (4 * len(new))] * len(new)
        assert sequence.columns["advantage"] == pytest.approx([advantage] * len(new), abs=1e-6)
        logps = [-0.1 * place - 0.01 * t for t in range(len(new))]
        assert sequence.columns["sampler_logps"] == pytest.approx(logps)


def test_a_judgment_with_the_mean_reward_of_its_group_counts_though_it_trains_nothing(monkeypatch):
    monkeypatch.setattr(train_rrm, "judgment_reward", lambda found, *_: found.score)
    sequences, line, _ = grpo_batch([[judgment_of(score) for score in (0.0, 0.5, 1.0)]] * 2)
    assert len(sequences) == 4 and line["pools/dropped"] == 0.0
    for sequence in sequences:
        assert sum(sequence.columns["weight"]) == pytest.approx(1 / 6)


def test_judgments_of_a_step_have_seeds_of_their_own_and_the_temperature_asked_for():
    _, _, asked = grpo_batch([[judgment_of(0.8)] * 3] * 2, temperature=0.7)
    assert len({seed for _, seed, _ in asked}) == 6 and {t for *_, t in asked} == {0.7}
    assert [asked[i][0] for i in range(6)] == [asked[0][0]] * 3 + [asked[3][0]] * 3


def test_a_judgment_cut_by_the_length_bound_earns_nothing():
    _, line, _ = grpo_batch([[judgment_of(0.8)] * 2], cut=[1])
    assert line["valid"] == 0.5 and line["reward"] == pytest.approx(earned(judgment(0.8)) / 2)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_sft_trains_the_judgment_and_not_its_prompt(weight):
    cfg = train_rrm.Config(max_context=4000, max_judgment_tokens=300, verdict_weight=weight)
    row = toy.rrm_row(random.Random(0), 0)
    (sequence,), total, _ = train_rrm.sft_batch(CHAT, [row], cfg)
    text = CHAT.text(reward_model.target_text(row))
    trained = [i for i, m in zip(sequence.ids, sequence.mask) if m]
    assert trained == [*text, CHAT.closer_id] and sequence.ids[-len(trained) :] == trained
    verdict = len(CHAT.text(reward_model.target_text(row).partition(" Found ")[0]))
    weights = [1.0] * verdict + [weight] * (len(trained) - verdict)
    assert sequence.columns["weight"] == weights and total == sum(weights)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"correct": "false"}, "'correct' is 'false': true or false"),
        ({"grounded": 1}, "'grounded' is 1: true or false"),
        ({"answer": {"text": "a"}}, "'answer' is {'text': 'a'}: a text, a number or a list"),
        ({"answer": ["a", None]}, "'answer' is ['a', None]: a text, a number or a list"),
        ({"critique": ["c"]}, "'critique' is ['c']: a text"),
        ({"score": "0.5"}, "'score' is '0.5': a number from 0 to 1"),
        ({"score": True}, "'score' is True: a number from 0 to 1"),
        ({"score": 2}, "'score' is 2: a number from 0 to 1"),
        ({"answer": 1969}, None),
        ({"answer": [1969, "a"]}, None),
        ({"answer": None, "correct": False}, None),
    ],
)
def test_a_field_of_another_kind_is_refused_at_opening(changes, told):
    found = reward_model.check_rrm_row(ROW | changes)
    assert (found or "").startswith(told or "") and bool(found) == bool(told)


def test_a_bad_row_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "trajectory": "t", "score": 2}\n')
    with pytest.raises(SystemExit, match=r"rows.jsonl:1: .score. is 2"):
        train_rrm.JsonlRows(str(path), reward_model.check_rrm_row)
