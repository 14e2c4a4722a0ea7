"""Drawing many pictures with one attached method, in batches. Each picture is kept as soon as it is drawn.

A picture depends only on its prompt, its seed and the method, not on its batch or on the pictures before it. So a batch
that fails is drawn again in smaller batches, and a picture that fails alone is reported.

Contents: PictureJob, Failure, draw, check_drawn, warnings_as_notes, options, guidance_of.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from molecli.bases.diffusion import Diffusion
from molecli.bases.out_of_memory import freed, out_of_memory
from molecli.bases.starts import Start
from molecli.catalog.builtin import package_folder
from molecli.config import ImageConfig
from molecli.errors import RunError, UserError
from molecli.protocols import Note

LESS_MEMORY = (
    "Lower --width and --height, or write --set image.branches_at_once=1, --set image.replay=false or --dtype bfloat16."
)
# Given to the backbone only where they are set.
_RARE = ("scheduler_options", "eta", "guidance_rescale", "clip_skip")
_NO_MEMORY = "one picture does not fit in memory"


@dataclass(frozen=True)
class PictureJob:
    """One picture to draw; messages call it `name`. start: the picture that it begins with, if any."""

    prompt: str
    seed: int
    name: str
    start: Start | None = None


@dataclass(frozen=True)
class Failure:
    """A picture that could not be drawn, and why."""

    job: PictureJob
    reason: str
    error: Exception


def draw(
    backbone: Any,
    jobs: Sequence[PictureJob],
    image: ImageConfig,
    *,
    batch_size: int,
    keep: Callable[[PictureJob, Image.Image], object],
    prepare: Note | None = None,
    ease: Callable[[], bool] | None = None,
    note: Note = lambda text: None,
) -> list[Failure]:
    """The pictures that could not be drawn; `keep` receives every other one, in the order of `jobs` within a batch.

    `prepare(prompt)` is called before each prompt's batches, for methods that read the prompt; a batch then has only
    one prompt. `note` receives a line when batches become smaller. If a single picture does not fit in memory, `ease()`
    is called to lower the memory needed; when it returns False, the remaining pictures are not tried.
    Raises: UserError, which every other picture would raise too.
    """
    failures: list[Failure] = []
    waiting = deque(_batches(jobs, batch_size, by_prompt=prepare is not None))
    prepared: str | None = None
    while waiting:
        batch = waiting.popleft()
        if prepare is not None and batch[0].prompt != prepared:
            prepared = batch[0].prompt
            prepare(prepared)
        error = _attempt(backbone, batch, image, keep)
        if error is None:
            continue
        if len(batch) > 1:
            size = len(batch) // 2 if out_of_memory(error) else 1
            if out_of_memory(error):
                note(f"{len(batch)} pictures at once do not fit in memory: drawing {size} at once")
                waiting = deque(piece for rest in waiting for piece in _pieces(rest, size))
            waiting.extendleft(reversed(list(_pieces(batch, size))))
        elif out_of_memory(error) and ease is not None and ease():
            note("one picture does not fit in memory: drawing it with fewer LoRAs per UNet call")
            waiting.appendleft(batch)
        elif out_of_memory(error):
            rest = [batch[0], *(job for others in waiting for job in others)]
            return failures + [Failure(job, _NO_MEMORY, error) for job in rest]
        else:
            failures.append(Failure(batch[0], _reason(error), error))
    return failures


def check_drawn(failures: Sequence[Failure], total: int) -> None:
    """Raises: RunError if pictures could not be drawn; it says how many, and why the first one failed."""
    if not failures:
        return
    first = failures[0]
    reasons = {failure.reason for failure in failures}
    what = f"{len(failures)} of {total} pictures could not be drawn ({first.job.name}: {first.reason})"
    if len(reasons) > 1:
        what += f", for {len(reasons)} different reasons"
    remedy = LESS_MEMORY if _NO_MEMORY in reasons else "The others are kept. Run with --verbose for the traceback."
    raise RunError("pictures", what, remedy) from first.error


@contextmanager
def warnings_as_notes(note: Note) -> Iterator[None]:
    """A context in which this package's warnings (for example that a prompt is cut) go to `note`, each text once."""
    seen: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def pass_on(message: Warning | str, category: type[Warning], filename: str, *more: Any, **others: Any) -> None:
            if not Path(filename).is_relative_to(package_folder()):
                show(message, category, filename, *more, **others)
            elif str(message) not in seen:
                seen.add(str(message))
                note(str(message))

        warnings.showwarning = pass_on
        warnings.filterwarnings("always", category=UserWarning, module=r"molecli\b")
        yield


def options(image: ImageConfig) -> dict[str, Any]:
    """How pictures are denoised, as keywords of `Diffusion.generate`."""
    rare = {
        name
        for name in _RARE
        if getattr(image, name) == ImageConfig.model_fields[name].get_default(call_default_factory=True)
    }
    return image.model_dump(exclude={"branches_at_once", *rare})


def guidance_of(image: ImageConfig, backbone: Diffusion) -> float:
    """The classifier-free guidance scale of the pictures: that of `image`, otherwise the base's default."""
    return backbone.guidance if image.guidance is None else image.guidance


def _attempt(
    backbone: Any, batch: Sequence[PictureJob], image: ImageConfig, keep: Callable[[PictureJob, Image.Image], object]
) -> Exception | None:
    """The error that stopped the batch; None if all its pictures were drawn and kept."""
    try:
        pictures = backbone.generate(
            [job.prompt for job in batch],
            seeds=[job.seed for job in batch],
            **(options(image) | _starts(batch)),
        )
    except UserError:
        raise
    except Exception as error:
        freed(error)
        return error
    for job, picture in zip(batch, pictures, strict=True):
        keep(job, picture)
    return None


def _starts(batch: Sequence[PictureJob]) -> dict[str, Any]:
    """The start of every picture; with one, the picture's size is its own."""
    starts = [job.start for job in batch if job.start is not None]
    return {"start": starts, "width": None, "height": None} if starts else {}


def _kinds(jobs: Sequence[PictureJob], by_prompt: bool) -> Iterator[list[PictureJob]]:
    """Consecutive jobs that can be in one batch."""

    def kind(job: PictureJob) -> tuple[Any, ...]:
        start = job.start
        return (job.prompt if by_prompt else None, None if start is None else (start.picture.size, start.strength))

    return (list(same) for _, same in groupby(jobs, key=kind))


def _batches(jobs: Sequence[PictureJob], size: int, *, by_prompt: bool) -> Iterator[list[PictureJob]]:
    for same in _kinds(jobs, by_prompt):
        yield from _pieces(same, size)


def _pieces(jobs: Sequence[PictureJob], size: int) -> Iterator[list[PictureJob]]:
    for start in range(0, len(jobs), size):
        yield list(jobs[start : start + size])


def _reason(error: Exception) -> str:
    text = " ".join((str(error).strip() or "no message").splitlines()[0].split()).rstrip(".")
    return f"{type(error).__name__}: {text}"
