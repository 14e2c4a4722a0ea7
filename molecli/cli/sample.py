"""`mole sample`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from molecli.cli.options import (
    BASE,
    IMAGE,
    LORAS,
    MASK,
    METHOD,
    OVERWRITE,
    SEED_AND_DEVICE,
    Flag,
    Request,
    Toggle,
    recipe_command,
)
from molecli.cli.runs import base_of_composition, base_of_recipe, is_recipe, started
from molecli.cli.single import single
from molecli.config import SampleRecipe
from molecli.errors import UsageError

if TYPE_CHECKING:
    from molecli.commands.sample import Samples

FLAGS = (
    Toggle("--prompt", "a prompt; may be repeated; - reads stdin", kind=list[str], metavar="TEXT"),
    Toggle(
        "--prompts-file",
        "prompts, one per line, or .jsonl with `prompt` or `input`; - reads stdin",
        kind=str,
        metavar="FILE",
    ),
    *BASE,
    *LORAS,
    *MASK,
    Flag("--max-new-tokens", "max_new_tokens"),
    Flag("--temperature", "temperature"),
    Flag("--top-p", "top_p"),
    Flag("--modes", "modes", metavar="MODES"),
    Flag("--images", "images"),
    Flag("--init-image", "init_image", metavar="FILE|DIR"),
    Flag("--mask-image", "mask_image", metavar="FILE|DIR"),
    Flag("--strength", "strength"),
    *IMAGE,
    *METHOD,
    Flag("--batch-size", "batch_size"),
    *SEED_AND_DEVICE,
    Flag("--output", "output", metavar="DIR"),
    OVERWRITE,
)
TARGET = ("RECIPE | COMPOSITION | -", "A recipe (.yaml), a composition (folder or .safetensors), or - for stdin.")


@recipe_command("sample", target=TARGET, flags=FLAGS)
def sample(request: Request) -> None:
    """Complete or draw prompts with a composition, single LoRAs or the bare base.

    Completions go to stdout, one per line in the order of the prompts; with --output also to samples.jsonl there. On a
    diffusion base, one PNG per picture, samples.jsonl and the contact sheet sheet.png (methods as columns, prompts as
    rows) go to the output folder, and the paths of the pictures to stdout.
    """
    target = request.targets[0] if request.targets else None
    file = target if target is not None and is_recipe(target) else None
    more = base_of_recipe(file, request)
    if target not in (None, "-", file):
        more |= {"composition": target, **base_of_composition(str(target), request)}
    prompts = _prompts(request, from_stdin=target == "-")
    if prompts:
        more["prompts"] = prompts
    recipe = request.recipe(file, more=more)
    assert isinstance(recipe, SampleRecipe)
    if not recipe.prompts:
        raise UsageError(
            "mole sample", "there is no prompt", "Write --prompt TEXT, --prompts-file FILE, or - for stdin."
        )
    from molecli.commands.sample import domain_for, run_sample

    domain, console = domain_for(recipe), request.console
    if recipe.output is None and not domain.command("sample").IN_FOLDER:
        _show(run_sample(recipe, domain=domain, progress=console.progress, note=console.note), request)
        return
    with started(recipe, request, file=file, domain=domain) as ready:
        _show(run_sample(ready, domain=domain, progress=console.progress, note=console.note), request)


def _show(samples: Samples, request: Request) -> None:
    """Prints the samples; then raises the error for those that failed."""
    if len(samples):
        request.console.result(samples.document(), lambda: print("\n".join(samples.lines())))
    samples.check()


def _prompts(request: Request, *, from_stdin: bool) -> list[str]:
    from molecli.cli.prompts import read_prompts

    given = list(request.switches["prompt"] or [])
    sources = ["-"] if from_stdin else []
    sources += [text for text in given if text == "-"]
    if request.switches["prompts_file"]:
        sources.append(request.switches["prompts_file"])
    if sources.count("-") > 1:
        raise UsageError("-", "stdin can be read only once", "Write - in one place.")
    return [text for text in given if text != "-"] + [prompt for source in sources for prompt in read_prompts(source)]


app = single(sample)
