"""The rules that MATH and GSM8K publish: they compare texts, ours (reagent/scorers.py) compare
values. Rows of `evaluate.py score` may name them."""

import re

from reagent import scorers
from toolkit.text import unwrapped

_FORMS = [("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")]
_FORMS += [(junk, "") for junk in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")]


def plain_latex(text: str) -> str:
    """The normal form in which the MATH benchmark compares answers (Hendrycks et al. 2021)."""
    for old, new in _FORMS:
        text = text.replace(old, new)
    if text.count("\\text{ ") == 1:  # a unit behind the number
        text = text.partition("\\text{ ")[0]
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    head, sign, tail = text.partition("=")
    if sign and "=" not in tail and len(head) <= 2:
        text = tail
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{\s])([^{\s])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{\s])\{", r"\\frac{\1}{", text)
    text = "\\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"^(0|-?[1-9]\d*)/(0|-?[1-9]\d*)$", r"\\frac{\1}{\2}", text)


def score_hendrycks(pred: str, gold: str) -> bool:
    """MATH's own rule: equal as strings in that normal form."""
    return plain_latex(unwrapped(pred)) == plain_latex(unwrapped(gold))


def score_gsm8k(pred: str, gold: str) -> bool:
    """GSM8K's own rule: the first "#### number", thousands commas removed, compared as text."""
    found = [re.search(r"#### (\-?[0-9\.\,]+)", unwrapped(text)) for text in (pred, gold)]
    return all(found) and len({number[1].replace(",", "") for number in found}) == 1


OFFICIAL = {"gsm8k_official": score_gsm8k, "hendrycks_is_equiv": score_hendrycks}


def rule_of(scorer: str):
    """What `scorers.score` takes for a name: the published rule of it, else the name."""
    return OFFICIAL.get(scorer, scorer)


def unknown(scorer) -> str | None:
    """What is wrong with the name of a scorer, or None."""
    problem = None if scorer in OFFICIAL else scorers.unknown(scorer)
    return problem and f"{problem}, {', '.join(OFFICIAL)}"
