"""Scores are read however a judge writes them, and are refused where what it meant cannot be told."""

from __future__ import annotations

import pytest

from molecli.metrics.judge.parse import Scores, UnreadableAnswer, parse_scores

EXPECTED = (Scores(7.5, 8.0), Scores(4.0, 9.0))
PLAIN = """For image 1: the hat is missing.
For image 2: the hands are deformed.
Image 1: Composition Quality: 7.5/10, Image Quality: 8/10
Image 2: Composition Quality: 4/10, Image Quality: 9/10"""

FORMS = {
    "plain": PLAIN,
    "carriage returns": PLAIN.replace("\n", "\r\n"),
    "lower case": PLAIN.lower(),
    "the second image first": "\n".join(reversed(PLAIN.splitlines())),
    "bold": """**Scores:**
**Image 1:** **Composition Quality: 7.5/10**, **Image Quality: 8/10**
**Image 2: Composition Quality: __4/10__, Image Quality: `9/10`**""",
    "headings and bullets": """### Image 1
- **Composition Quality**: 7.5/10
- **Image Quality**: 8/10

### Image 2
* Composition Quality: 4/10
* Image Quality: 9/10""",
    "line breaks everywhere": """Image 1:

Composition Quality:
7.5 / 10,

Image Quality:
8 / 10

Image 2:

Composition Quality:
4 / 10,

Image Quality:
9 / 10""",
    "one line": "Scores: Image 1: Composition Quality: 7.5/10, Image Quality: 8/10, "
    "Image 2: Composition Quality: 4/10, Image Quality: 9/10",
    "reasons between the two": """Image 1: Composition Quality: 7.5/10 (-2.5: 1 feature is missing). Image Quality: 8/10
Image 2: Composition Quality: 4/10 - two elements are wrong
Image Quality: 9/10""",
    "for image": "For Image 1:\nComposition Quality: 7.5/10\nImage Quality: 8/10\n"
    "For Image 2:\nComposition Quality: 4/10\nImage Quality: 9/10",
    "decimals": "Image 1: Composition Quality: 7,5/10.0, Image Quality: 8.0/10.0\n"
    "Image 2: Composition Quality: 4.00/10, Image Quality: 9.0/10.",
    "other signs": "Image 1 – Composition Quality – 7.5 out of 10; Image Quality = 8 out of 10\n"
    "Image #2：Composition Quality score：4/10, Image Quality - 9/10",
    "quoted": "> Image 1: Composition Quality: 7.5/10, Image Quality: 8/10\n"
    "> Image 2: Composition Quality: 4/10, Image Quality: 9/10",
    "a table of one cell each": "| Image 1 | Composition Quality: 7.5/10 | Image Quality: 8/10 |\n"
    "| Image 2 | Composition Quality: 4/10 | Image Quality: 9/10 |",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_a_form_that_is_read(text: str) -> None:
    assert parse_scores(text) == EXPECTED


@pytest.mark.parametrize(("written", "read"), [("7.3", 7.5), ("7.2", 7.0), ("7.25", 7.5), ("9.9", 10.0), ("0.1", 0.0)])
def test_a_score_off_the_grid_goes_to_the_nearest_half(written: str, read: float) -> None:
    first, second = parse_scores(PLAIN.replace("7.5/10", f"{written}/10"))
    assert (first, second) == (Scores(read, 8.0), EXPECTED[1])


def test_the_last_scores_of_each_image_count() -> None:
    draft = PLAIN.replace("7.5/10", "2/10").replace("9/10", "3/10")
    assert parse_scores(f"<think>{draft}</think>\nOn reflection:\n{PLAIN}") == EXPECTED


def test_scores_in_the_explanation_of_one_image_are_only_a_draft() -> None:
    text = "For image 1: Composition Quality: 9/10, Image Quality: 9/10. For image 2, I saw no hat.\n" + PLAIN
    assert parse_scores(text) == EXPECTED


def test_scores_said_twice_alike_are_said_once() -> None:
    assert parse_scores(f"{PLAIN}\n{PLAIN.splitlines()[-1]}") == EXPECTED


def test_the_other_image_in_an_explanation_is_no_heading() -> None:
    first = "Image 1: Composition Quality: 7.5/10, Image Quality: 8/10\n"
    text = first + "It is better than image 2. Composition Quality: 1/10, Image Quality: 1/10"
    with pytest.raises(UnreadableAnswer, match="no scores for image 2"):
        parse_scores(text)


def _changed(old: str, new: str) -> str:
    assert old in PLAIN
    return PLAIN.replace(old, new)


REFUSED = {
    "": "the answer is empty",
    "Two fine pictures.": "no scores in it ('Two fine pictures.')",
    "I'm sorry, but I can't help with that.": "the judge declines (\"I'm sorry, but I can't help with that.\")",
    "I am unable to compare images of people.": "the judge declines ('I am unable to compare images of people.')",
    "I cannot see any pictures.": "the judge declines ('I cannot see any pictures.')",
    "word " * 40: "no scores in it ('" + ("word " * 16).strip() + "...')",
    PLAIN.rpartition("\n")[0]: "no scores for image 2",
    _changed("Image 1", "Image 2").replace("4/10", "7.5/10").replace("9/10", "8/10"): "no scores for image 1",
    _changed("Image 2:", "Image 3:"): "scores for an image 3 that was not shown",
    _changed("Image 2:", "Image 1:"): "no scores for image 2",
    f"{PLAIN}\nImage 2: Composition Quality: 5/10, Image Quality: 9/10": "its last score lines contradict each other",
    _changed("9/10", "11/10"): "the score 11/10 is not between 0 and 10",
    _changed("9/10", "-1/10"): "the score -1/10 is not between 0 and 10",
    _changed(" 9/10", " 9/100"): "no scores for image 2",
    _changed(" 9/10", " 4/5"): "no scores for image 2",
    _changed(" 9/10", " 8-9/10"): "no scores for image 2",
    _changed(" 9/10", " high"): "no scores for image 2",
    "Image 1: Composition Quality: x/10, Image Quality: y/10": "no scores in it "
    "('Image 1: Composition Quality: x/10, Image Quality: y/10')",
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.items(), ids=[reason[:40] for reason in REFUSED.values()])
def test_an_answer_that_is_no_use(text: str, reason: str) -> None:
    with pytest.raises(UnreadableAnswer) as caught:
        parse_scores(text)
    assert str(caught.value) == reason


def test_an_answer_that_runs_on_in_blanks_or_digits_takes_no_time() -> None:
    tails = (
        "\n" * 300_000,
        " \n" * 150_000,
        ":" + "\n" * 300_000,
        ":" + "9" * 300_000,
        ": 7/10 " + "Image 1 " * 50_000,
    )
    for tail in tails:
        with pytest.raises(UnreadableAnswer):
            parse_scores("Image 1: Composition Quality" + tail)
