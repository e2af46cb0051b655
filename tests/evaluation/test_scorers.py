"""Scorers against the outputs of the official code and against the benchmarks' own gold
solutions.
"""

import itertools
import json
import random
import re
import time
import unicodedata
from fractions import Fraction
from pathlib import Path

import pytest

from data.official import rule_of
from reagent import scorers
from reagent.scorers import SCORERS, rule_reward, score
from tests.evaluation import reformatted

SHARED = Path(__file__).parents[3] / "shared" / "data"
CASES = Path(__file__).parents[1] / "cases"


def rows(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_the_outputs_of_the_official_scorers():
    for row in rows(CASES / "official.jsonl"):
        got = score(rule_of(row["scorer"]), row["pred"], row["gold"])
        if "expected" in row:
            assert got["correct"] == row["expected"], row
        else:
            assert (got["em"], round(got["f1"], 6)) == (float(row["em"]), row["f1"]), row


def test_answers_that_fell_have_their_plain_sense():
    for row in rows(CASES / "answers.jsonl"):
        assert score(row["scorer"], row["pred"], row["gold"])["correct"] is row["expected"], row


@pytest.mark.skipif(not (SHARED / "math500").is_dir(), reason="MATH500 is not here")
def test_the_gold_solutions_of_math500_are_right():
    wrong = [
        r["unique_id"]
        for r in rows(SHARED / "math500/test.jsonl")
        if not score("math", r["solution"], r["answer"])["correct"]
    ]
    assert wrong == []


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="GSM8K is not here")
def test_the_gold_solutions_of_gsm8k_are_right():
    for row in rows(SHARED / "gsm8k/test.jsonl"):
        assert score("math", row["answer"], row["answer"].rpartition("####")[2])["correct"]
        assert score(rule_of("gsm8k_official"), row["answer"], row["answer"])["correct"]


@pytest.mark.parametrize(
    "scorer",
    ["gaia", "hotpotqa", "2wiki", "musique", "bamboogle", "math", "choice", "hendrycks_is_equiv"],
)
@pytest.mark.parametrize("pred", ["", "  ", None])
def test_an_empty_prediction_is_never_right(scorer, pred):
    rule = rule_of(scorer)
    assert not score(rule, pred, "the")["correct"] and not score(rule, pred, "")["correct"]


@pytest.mark.parametrize(
    "pred, gold, right",
    [
        ("25", "025", True),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("x + 1", "1 + x", True),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("1,234", "1234", True),
        ("3", "4", False),
        ("unknown", "no", False),
        ("\\frac{", "1", False),
    ],
)
def test_mathematics(pred, gold, right):
    assert score("math", pred, gold)["correct"] is right


# --------------------------------------------------------------------------------------------------
# mathematics: notation, form and value, each against plain sense

SAME = """
\\frac12. | 0.5 | ½ | \\tfrac{2}{4} | 1/2 | .5 | $\\frac{1}{2}$ | 50\\% |
\\left(\\frac{1}{2}\\right)
2 1/3 | \\frac{7}{3} | 2\\frac13 | 7/3 | 2⅓
\\dfrac{\\pi}{2} | pi/2 | π/2 | \\frac\\pi2 | 0.5\\pi
√2 | \\sqrt2 | sqrt(2) | \\sqrt{2} | 2^{1/2} | \\frac{2}{\\sqrt 2}
12\\,345 | 12,345 | 12345 | 12{,}345 | 12,\\!345 | $12,345 | \\$12345.00 | 1.2345 \\times 10^4
29 | 29 dollars | \\$29 | 29.0 | x = 29 | 29\\text{ cm} | 29^\\circ |
The answer is 29. | \\text{29} | +29
7,5,3 | 3, 5, 7 | 5 and 3 and 7 | \\{3, 5, 7\\} | {7,3,5} | x=3, x=5 \\text{ or } x=7
(0, 12.5) | 0 < x < 12.5 | x \\in (0,\\frac{25}{2}) | 12.5 > x > 0 | \\left( 0, 12.5 \\right)
[5,\\infty) | x \\ge 5 | 5 ≤ x | [5, ∞)
(-\\infty, 2) \\cup (3, \\infty) | x<2 or x>3 | (3,\\infty)∪(-∞,2)
1 \\pm \\sqrt{19} | 1-√19, 1+√19 | \\{1\\pm\\sqrt{19}\\}
864 \\mbox{ inches}^2 | 864 | 864 in^2 | 864 square inches
y = 2x + 3 | 2x+3 | y - 2x = 3 | y=3+2x
5x - 7y + 4 = 0 | 7y - 5x = 4 | 10x - 14y = -8
\\begin{pmatrix} 1/2 \\\\ -3 \\end{pmatrix} | \\begin{bmatrix}0.5\\\\-3\\end{bmatrix} |
(\\frac12, -3)
6:00 \\text{ PM} | 6:00 PM | 6:00 p.m.
\\text{Evelyn} | Evelyn | evelyn | \\textbf{Evelyn}. | **Evelyn**
\\cot x | cot(x) | \\frac{\\cos x}{\\sin x}
1-\\frac{1}{e} | 1 - 1/\\mathrm{e} | -e^{-1}+1
0.1\\overline{6} | 1/6 | 0.1\\bar{6} | \\frac{1}{6} = 0.1\\overline{6}
5 | AB = 5 | x=5 | \\boxed{5}
\\frac{n!}{2} | n!/2
52_8 | 52_{8} | 52₈
10^{100}+1 | 1+10^{100}
\\frac{1}{\\sqrt{n}} | \\sqrt{1/n} | n^{-1/2}
"""
DIFFERENT = """
1,2 | 12 | 1.2 | (2,1) | 1/2 | 1_2
3,5,7 | 357 | 3,5 | 3,5,7,9 | 3,5,8 | 3-5-7
10,00 | 1000
2_3 | 23
1.0000000001 | 1
9007199254740993 | 9007199254740992 | 9007199254740992.5
1e999 | 1e998
10^{100} | 10^{100}+1
9.1\\times 10^{-31} | 1.6\\times 10^{-19}
\\frac{1}{2004!} | \\frac{1}{2006!}
\\pi | 3.14159265358979323846 | \\frac{22}{7} | \\pi + 10^{-60}
1 + \\frac{1}{\\mathrm{e}} | 1 - \\frac{1}{\\mathrm{e}}
1, 3, 5, \\ldots, 2n-1 | 1, 2, \\ldots, n
(0,1) | [0,1) | (0,1] | [0,1] | \\{0,1\\} | (1,0)
x > 3 | x < 3 | x \\ge 3 | t > 3
29 | 29 thousand | 29 dozen | 29k | 29x | 29 or 30 | not 29 | at least 29 | 2 9 | 29^2
5 \\text{ cents} | 5 \\text{ dollars}
15\\text{ cm}^2 | 15\\text{ m}^2 | 15\\text{ cm}^3
52_8 | 52_7 | 528
3R^2 | 3r^2
x_1 | x_2 | x1
y = 2x | y = 3x | 2x = 3
i^2 | 1
\\text{listen} | \\text{silent}
cat | act
\\log_8(4) = \\frac{2}{3} | \\log_{18}(4) = \\frac{2}{3}
6:00 \\text{ PM} | 6:00 AM
17\\% | 1.7
"""


def lines(text):
    return [
        [part.strip() for part in line.split(" | ")]
        for line in text.strip().replace("|\n", "| ").splitlines()
    ]


@pytest.mark.parametrize("forms", lines(SAME), ids=str)
def test_the_same_answer_in_other_hands_is_right_both_ways(forms):
    pairs = [pair for form in forms for pair in ((form, forms[0]), (forms[0], form))]
    assert [pair for pair in pairs if not score("math", *pair)["correct"]] == []


@pytest.mark.parametrize("forms", lines(DIFFERENT), ids=str)
def test_other_answers_that_look_alike_are_wrong_both_ways(forms):
    pairs = [(a, b) for a, b in itertools.permutations(forms, 2) if score("math", a, b)["correct"]]
    assert pairs == []


def expression(rng, depth=3):
    """A random rational expression as (LaTeX, value)."""
    if not depth or rng.random() < 0.2:
        n = rng.randint(1, 12)
        return str(n), Fraction(n)
    (a, x), (b, y) = expression(rng, depth - 1), expression(rng, depth - 1)
    made = [(f"{a} + {b}", x + y), (f"{a} - ({b})", x - y), (f"({a})\\cdot({b})", x * y)]
    made += [(f"\\left({a}\\right)^{{2}}", x * x), (f"\\left({a}\\right)({b})", x * y)]
    made += [(f"\\frac{{{a}}}{{{b}}}", x / y)] if y else []
    return rng.choice(made)


def test_expressions_have_the_value_of_exact_arithmetic():
    rng = random.Random(0)
    for _ in range(300):
        latex, value = expression(rng)
        assert score("math", latex, str(value))["correct"], latex
        assert score("math", str(value), latex)["correct"], latex
        assert not score("math", latex, str(value + Fraction(1, 10**12)))["correct"], latex


HOSTILE = ["(" * 3000, "9^{9^{9^{9}}}", "9" * 5000, "3000!" * 200, "\\frac{" * 300, "1," * 3000]
HOSTILE += ["\\sqrt{" * 400 + "2" + "}" * 400, "(2^{29999})" * 90, "\\exp(" * 99 + "9" + ")" * 99]
HOSTILE += [
    "x!" * 400,
    "|" * 1999,
    "1±" * 900,
    "a=b" * 400,
    "1e999" * 99,
    "@quad(9)",
    "\\text{" * 900,
]
HOSTILE += [
    "½" * 900,
    "²" * 900,
    "0.\\overline{" + "3" * 900 + "}",
    "1,000" * 300,
    "1/" * 400 + "1",
]


@pytest.mark.parametrize("pred", HOSTILE, ids=range(len(HOSTILE)))
def test_no_answer_holds_a_scorer_up(pred):
    began = time.process_time()
    for scorer, gold in itertools.product(scorers.SCORERS, ("5", "\\frac{1}{2}", "1,2,3", "x^2+1")):
        assert not score(scorer, pred, gold)["correct"]
    score("math", pred, pred)
    assert time.process_time() - began < 5


# --------------------------------------------------------------------------------------------------
# LaTeX and markdown around answers, numbers of GAIA, choices


@pytest.mark.parametrize("scorer", ["hotpotqa", "2wiki", "musique", "bamboogle", "gaia"])
@pytest.mark.parametrize(
    "pred, gold",
    [
        ("\\text{Paris}", "Paris"),
        ("$\\textbf{Barack Obama}$", "Barack Obama"),
        ("**St. Petersburg**.", "St. Petersburg"),
        ("\\text{AT\\&T}", "AT&T"),
        ("`f(x)`", "f(x)"),
        ("Beyonc\\'{e}", "Beyoncé"),
        (unicodedata.normalize("NFD", "Beyoncé"), "Beyoncé"),
        ("Beyoncé", unicodedata.normalize("NFD", "Beyoncé")),
        ("\\boxed{\\emph{Rome}}", "Rome"),
        ("\\$17", "$17"),
    ],
)
def test_latex_and_markdown_are_taken_off_before_words_are_compared(scorer, pred, gold):
    assert score(scorer, pred, gold)["correct"]


@pytest.mark.parametrize(
    "pred, gold, right",
    [
        ("\\$17", "17", True),
        ("17\\%", "17", True),
        ("12,345", "12345", True),
        ("1,2", "12", False),
        ("12,34", "1234", False),
        ("9007199254740993", "9007199254740992", False),
        ("anything", "inf", False),
        ("1e999999999", "1", False),
        ("\\text{a, b, c}", "a,b,c", True),
        ("b, a", "a, b", False),
        ("2.0, 3", "2, 3", True),
    ],
)
def test_numbers_and_lists_of_gaia(pred, gold, right):
    assert score("gaia", pred, gold)["correct"] is right


CHOSEN = """
B | (b) | **B** | \\textbf{(B)} | [B] | B. | B) Paris | B: Paris | Option B |
The answer is (B) Paris. | Answer: **B** | the correct option is B | (b) because A is wrong |
B is correct | I choose B. | $B$ | B!
B. Paris | Paris | B | (B) Paris | \\text{Paris} | B. Vitamin C deficiency is another matter
"""
NOT_CHOSEN = """
A | A, B, C, D | A or B | A and B | A/B | none of A, B, C | A good guess would be C | not A | AB |
A is wrong, so B | A) is wrong | It is not A but C | A) one B) two | (A) (B) | The answer is B |
E
B. Paris | C | B. Rome | London | A. Paris
"""


@pytest.mark.parametrize("gold, preds", [(line[0], line[1:]) for line in lines(CHOSEN)], ids=str)
def test_a_choice_is_one_letter_or_the_words_of_the_option(gold, preds):
    wrong = [pred for pred in preds if not score("choice", pred, gold)["correct"]]
    assert wrong == [pred for pred in preds if "Vitamin" in pred]  # other words than the option's


@pytest.mark.parametrize("gold, preds", [(x[0], x[1:]) for x in lines(NOT_CHOSEN)], ids=str)
def test_several_letters_or_other_words_are_no_choice(gold, preds):
    assert [pred for pred in preds if score("choice", pred, gold)["correct"]] == []


# --------------------------------------------------------------------------------------------------
# answers written otherwise

MATHS = """
7 | -3 | 1,234 | \\$18.90 | \\frac{3}{4} | -\\frac{7}{3} | 3\\sqrt{5} | 1,-2 | (3,4] | (2,\\infty) |
x^2+3x-6 | \\text{even} | \\frac{\\pi}{6} | 6+9i | 52_8 | \\left( 2, \\frac{\\pi}{3} \\right) |
10,\\!080 | 90^\\circ | 1 \\pm \\sqrt{19} | (0,9) \\cup (9,36) | y = 2x + 3 | 15\\mbox{ cm}^2 |
\\begin{pmatrix} -2 \\\\ 5 \\end{pmatrix}
"""
OWN = {
    "math500": lines(MATHS)[0],
    "gsm8k": ["42", "1,080", "5", "25000"],
    "hotpotqa": [["Ada Lovelace"], ["the Nile"], ["1843", "in 1843"], ["São Paulo"], ["AT&T Inc."]],
    "xbench": ["北京大学", "3.5亿元"],
}


def test_of_rewritten_golds_none_is_scored_against_its_truth():
    counts, fell = reformatted.fallen(reformatted.pairs_of(OWN))
    assert fell == [] and sum(n for (_, what), n in counts.items() if what == "pairs") > 2000


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public sets are not here")
def test_of_rewritten_golds_of_the_public_sets_none_is_scored_against_its_truth():
    pairs = list(reformatted.pairs_of(reformatted.golds_of(SHARED)))
    assert reformatted.fallen(random.Random(1).sample(pairs, 4000))[1] == []


@pytest.mark.parametrize(
    "scorer, pred, gold, em, f1",
    [  # by hand, from the rules of the sets
        (
            "hotpotqa",
            "red red blue",
            "red blue blue",
            0,
            2 / 3,
        ),  # words count as often as they stand
        ("musique", "red red red", "red", 0, 1 / 2),
        ("hotpotqa", "yes it is", "yes", 0, 0.0),  # yes, no and noanswer: whole or nothing
        ("2wiki", "no", "not known", 0, 0.0),
        ("musique", "yes it is", "yes", 0, 1 / 2),
        ("hotpotqa", "The Nile!", "nile", 1, 1.0),
        ("bamboogle", "a river in Egypt", "Egypt", 0, 1 / 2),
        ("hotpotqa", "the", "a", 1, 0.0),  # nothing against nothing
        ("musique", "the", "a", 1, 1.0),
    ],
)
def test_exact_match_and_f1_of_the_sets(scorer, pred, gold, em, f1):
    got = score(scorer, pred, gold)
    assert (got["em"], got["f1"]) == (em, pytest.approx(f1))


# what the published code of the benchmark calls the same, whatever it means
HENDRYCKS = r"""
\tfrac{3}{4} == \frac34 | \dfrac{3}{4} == \frac{3}{4} | \frac1{72} == \frac{1}{72}
7/8 == \frac{7}{8} | -7/8 == \frac{-7}{8} | 0.5 == \frac12 | .25 == 0.25 | \sqrt7 == \sqrt{7}
30^\circ == 30 | 45^{\circ} == 45 | \left(1, 2\right) == (1,2) | 12\text{ cm} == 12 | \$15 == 15
20\% == 20 | 5\!000 == 5000 | k=9 == 9 | AB=9 == 9 | x \in .5 == x\in0.5 | {.5} == {0.5}
1,000 != 1000 | 2.0 != 2 | 1/2 != .25 | \frac{2}{4} != \frac{1}{2} | x+1 != 1+x | ABC=9 != 9
9 != -9 | (1,2) != (2,1) | 07/8 != 7/8 | 5\text{cm} != 5 | a=b=9 != 9 | 20% != 20 | Yes != yes
"""
GSM8K = r"""
so #### 42 == #### 42 | #### 1,234 == #### 1234 | #### -7 == #### -7 | #### 3. == it is #### 3.
#### 5 #### 6 == #### 5 | #### 18 dollars == #### 18 | #### 42 != #### 43 | 42 != #### 42
####42 != #### 42 | #### 5.0 != #### 5 | #### $5 != #### 5 | #### 5 #### 6 != #### 6
#### five != #### five
"""


@pytest.mark.parametrize(
    "scorer, text", [("hendrycks_is_equiv", HENDRYCKS), ("gsm8k_official", GSM8K)]
)
def test_the_published_rules_of_math_and_gsm8k(scorer, text):
    for pair in itertools.chain(*lines(text)):
        pred, sign, gold = re.split(" ([=!]=) ", pair)
        assert score(rule_of(scorer), pred, gold)["correct"] is (sign == "=="), pair


@pytest.mark.parametrize(
    "pred, gold, right",
    [
        ("a, b", "a, b, c", False),
        ("a, b, c", "a, b", False),
        ("a; B", "a,b", True),
        ("1, 2", "1, 2, 2", False),
        ("1, 2, 3", "1, 2", False),
        ("1.0, 2", "1; 2", True),  # either sign parts
        ("ab", "a;b", False),
        ("a., b", "a, b", False),  # the texts in a list keep their punctuation
        ("a-b", "a, b", False),
    ],
)
def test_lists_of_gaia_have_as_many_items(pred, gold, right):
    assert score("gaia", pred, gold)["correct"] is right


def test_an_unknown_scorer_is_an_error():
    with pytest.raises(ValueError, match="no scorer 'x'"):
        score("x", "1", "1")


@pytest.mark.parametrize(
    "answer, reward, correct",
    [
        ("New York", 1.0, True),
        ("New York City", 0.8, False),
        ("a b c d e f g h New York", 2 * 2 / 11, False),
        ("in a far away town called York of the big old north", 0.0, False),
        (None, 0.0, False),
        ("unknown", 0.0, False),
    ],
)
def test_rule_reward(answer, reward, correct):
    got = rule_reward({"kind": "qa", "answer": ["New York", "NY"]}, answer)
    assert got == (pytest.approx(reward), correct)


@pytest.mark.parametrize("words, reward", [("q r s t u v w", 0.3), ("q r s t u v w x", 0.0)])
def test_an_f1_at_the_floor_earns_itself_and_one_below_it_nothing(words, reward):
    row = {"kind": "qa", "answer": "b c d e f g h i j k"}
    assert rule_reward(row, f"b c d {words}") == (reward, False)


@pytest.mark.parametrize(
    "kind, answer, pred, right",
    [
        ("qa", "The Nile", "nile!", True),
        ("qa", "0.5", "1/2", False),
        ("math", "0.5", "1/2", True),
        ("gaia", "0.5", "1/2", False),
        ("gaia", "1,7", "1; 7.0", True),
        ("choice", "B", "The answer is (B).", True),
        ("qa", "B", "The answer is (B).", False),
    ],
)
def test_every_kind_of_row_has_its_own_rule(kind, answer, pred, right):
    reward, said = rule_reward({"kind": kind, "answer": answer}, pred)
    assert said is right and (reward == 1.0) == right


@pytest.mark.parametrize("rule", [*SCORERS, str.__eq__])
def test_one_of_several_references_is_enough_for_every_scorer(rule):
    for golds, right in (
        (["B"], True),
        (["A", "B"], True),
        (["B", "C", "A"], True),
        (["A"], False),
    ):
        assert score(rule, "B", golds)["correct"] is right


@pytest.mark.parametrize("gold, right", [("4", True), ("#### 4", True), ("3", False)])
def test_what_stands_after_four_signs_is_stated_before_what_a_box_holds(gold, right):
    assert score("math", "so \\boxed{3} #### 4", gold)["correct"] is right


def test_no_inside_unknown_earns_nothing():
    assert rule_reward({"kind": "qa", "answer": "no"}, "unknown") == (0.0, False)


def test_f1_counts_a_word_as_often_as_both_have_it():
    assert score("hotpotqa", "red red blue", ["red red green"])["f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("pred", ["I would not choose B", "none of them is B", "Don't pick B"])
def test_a_letter_that_is_denied_is_not_chosen(pred):
    assert not score("choice", pred, ["B"])["correct"]
    assert score("choice", "I would choose B", ["B"])["correct"]


@pytest.mark.parametrize("word", ["yes", "no", "noanswer"])
@pytest.mark.parametrize("other", ["yes", "no", "noanswer", "it is {}", "{} sir"])
def test_a_verdict_of_hotpotqa_is_equal_or_worth_nothing_on_either_side(word, other):
    other = other.format(word)
    for pred, gold in ((word, other), (other, word)):
        assert scorers.token_f1(pred, gold, True) == float(pred == gold)
        shared = len(set(pred.split()) & set(gold.split()))
        f1 = 2 * shared / len((pred + " " + gold).split())
        assert scorers.token_f1(pred, gold, False) == pytest.approx(f1)  # MuSiQue's
