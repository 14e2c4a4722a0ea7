"""The question for the judge.

Source: Multi-LoRA Composition (arXiv 2402.16843), section 4 and appendix: the criteria and the deductions are from the
paper, the wording is not.
"""

from __future__ import annotations

from collections.abc import Sequence

from molecli.protocols import Element

VERSION = "1"  # raise it if a change of the wording can change scores

_OPENING = """\
You will see two pictures, image 1 and image 2, drawn by two different systems. Both systems had to bring all of these \
elements together in one picture:
"""

_RULES = """\
Give each picture two marks between 0 (worst) and 10 (best), in steps of 0.5. Start from 10 and take points off.

Composition quality: are the elements there and right, and do they belong together?
- Take off 3 if an element is absent or shown wrongly.
- Take off 1 for each listed feature of an element that is absent or wrong.
- Take off 1 if elements fit together slightly badly.
- Take off more where the whole is incoherent, implausible or without ideas.

Image quality: is the picture well made, whatever it shows?
- Take off 3 for each deformity: a limb or finger too many, a warped face, impossible proportions.
- Take off 2 if texture, lighting or colour is plainly off.
- Take off 1 for each small blemish.
- Take off more for anything else that spoils clarity or looks.

Be strict. Go through image 1, then image 2, and say what you take off and why. Which picture comes first means \
nothing. The two are seldom equally good: do not let them draw on both criteria if you can tell them apart.

Finish with exactly these two lines, numbers in place of x and y:
Image 1: Composition Quality: x/10, Image Quality: y/10
Image 2: Composition Quality: x/10, Image Quality: y/10"""

_AGAIN = "An earlier answer to this could not be used: {reason}. Do not leave out the two lines at the end."


def question(elements: Sequence[Element]) -> str:
    """The text of a request with two pictures."""
    lines = "\n".join(f"{i}. {_described(element)}" for i, element in enumerate(elements, start=1))
    return f"{_OPENING}\n{lines}\n\n{_RULES}"


def once_more(text: str, reason: str) -> str:
    """The question `text` again, after an answer that was unusable for `reason`."""
    return f"{text}\n\n{_AGAIN.format(reason=reason)}"


def _described(element: Element) -> str:
    features = ", ".join(_one_line(feature) for feature in element.features if feature.strip())
    return f"{_one_line(element.kind)} ({_one_line(element.name)})" + (f": {features}" if features else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())
