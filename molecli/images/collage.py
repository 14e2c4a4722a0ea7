"""Collages: pictures of several concepts in one, with a prompt that names them all. Gates learn from such prompts.

Collage     the pictures that are shown, and the prompt
Collages    makes random collages of an album's pictures
lay_out     the pixels of 2 or 3 pictures as one

No such training is published for gates. CutMix (Yun et al. 2019) and similar work join pictures for classifiers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from molecli.files.concepts import Concept
from molecli.images.joint_prompts import Wording, is_subject, joint_prompt, worded
from molecli.images.pictures import Album

MOST = 3


@dataclass(frozen=True)
class Collage:
    """The indices in the album of the pictures that are shown, and the prompt that names what they show."""

    places: tuple[int, ...]
    prompt: str


class Collages:
    """Collages of the pictures of things in `album`, chosen by torch's global CPU generator.

    Styles and backgrounds are left out: their pictures show other things, and half a picture cannot have a style.
    """

    def __init__(self, album: Album, concepts: Mapping[str, Concept]) -> None:
        self.album = album
        self.wordings: dict[int, Wording] = {}
        self.places: dict[str, list[int]] = {}
        for place, picture in enumerate(album.pictures):
            concept = concepts[picture.task]
            if is_subject(concept):
                self.wordings[place] = worded(picture.prompt, concept)
                self.places.setdefault(picture.task, []).append(place)

    def can_hold(self, place: int) -> bool:
        """Whether the picture at `place` can be in a collage: it shows a thing, and there is another thing."""
        return place in self.wordings and len(self.places) > 1

    def draw(self, place: int) -> Collage:
        """A collage of the picture at `place` and pictures of one or two other concepts, in random order.

        Another concept's picture has the same scene if there is one with it.
        """
        own = self.album.pictures[place].task
        others = [name for name in self.places if name != own]
        count = min(2 + _any(MOST - 1), 1 + len(others))
        chosen = [others[i] for i in torch.randperm(len(others))[: count - 1].tolist()]
        places = [place, *(self._picture_of(name, self.wordings[place].scene) for name in chosen)]
        places = [places[i] for i in torch.randperm(count).tolist()]
        return Collage(tuple(places), joint_prompt([self.wordings[shown] for shown in places]))

    def pixels(self, collage: Collage) -> Tensor:
        """[3, side, side] in [-1, 1]."""
        return lay_out(self.album.pixels(collage.places))

    def _picture_of(self, name: str, scene: str) -> int:
        places = [place for place in self.places[name] if self.wordings[place].scene == scene] or self.places[name]
        return places[_any(len(places))]


def lay_out(pictures: Tensor) -> Tensor:
    """[3, S, S] of 2 or 3 pictures [K, 3, S, S] at half their size: two halves, or a half beside two quarters.

    A single picture lies anywhere along its half, and its edge pixels are repeated to fill the half. The halves are
    side by side, or one above the other.
    """
    side = pictures.shape[-1]
    upright = _any(2) == 1
    small = F.interpolate(pictures, size=(side // 2, side // 2), mode="area")
    if upright:
        small = small.transpose(2, 3)
    first = 1 + (_any(2) if len(small) == MOST else 0)
    whole = torch.cat([_half(small[:first], side), _half(small[first:], side)], dim=2)
    return whole.transpose(1, 2) if upright else whole


def _half(pictures: Tensor, side: int) -> Tensor:
    """[3, side, side/2] of one picture or two."""
    if len(pictures) == 2:
        return torch.cat(list(pictures), dim=1)
    room = side - pictures.shape[2]
    top = _any(room + 1)
    return F.pad(pictures, (0, 0, top, room - top), mode="replicate")[0]


def _any(count: int) -> int:
    """One of 0, 1, ..., count - 1."""
    return int(torch.randint(count, ()))
