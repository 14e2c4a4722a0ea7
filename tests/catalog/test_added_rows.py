"""What an installed package adds is one file and one row: it is found, shown, refused and run like what ships.

Each file below holds a row and what it names; the package's entry points lead to the rows. Commands run in another
process, for the choices of `--mode` are made when the package is imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    "halved": """
from molecli.catalog.methods import Method, Option

ROW = Method(
    "halved", "merges", False, "none", "the sum, divided",
    (Option("divisor", 2.0, "what the sum is divided by", bounds={"gt": 0}),), module=__name__,
)


def merge(updates, config):
    from molecli.methods.merges import cat

    A, B, error = cat.merge(updates, config)
    return A, B / config.divisor, error
""",
    "leaning": """
from molecli.catalog.methods import Method

ROW = Method("leaning", "gates", True, "none", "one learned mixture at each site", module=__name__)


def build_gates(config, bank, sites, *, seq2seq, memory_width=None):
    import torch

    class Leaning(torch.nn.Module):
        per_sequence, remembers, constant = True, False, True

        def __init__(self):
            super().__init__()
            self.leaning = torch.nn.Parameter(torch.zeros(len(bank)))

        def forward(self, reading, keep=None):
            logits = self.leaning if keep is None else self.leaning.masked_fill(keep == 0, float("-inf"))
            return logits.softmax(-1)

    return {site.name: Leaning() for site in sites}
""",
    "latest": """
from molecli.catalog.methods import Method

ROW = Method("latest", "outputs", False, "none", "images: the last LoRA alone", ("order",), module=__name__)


def method(names, weights, config, *, triggers, kinds):
    from molecli.methods.outputs.by_name import turns
    from molecli.methods.outputs.switch import Switch

    return Switch(weights, turns=turns(config.order, names)[-1:], tau=1)
""",
    "vowels": """
from molecli.catalog.metrics import MetricRow

ROW = MetricRow("vowels", f"{__name__}:score", "share of answers with as many vowels")


def score(predictions, answers):
    def count(text):
        return sum(letter in "aeiou" for letter in text)

    return [float(any(count(text) == count(one) for one in some)) for text, some in zip(predictions, answers)]
""",
    "echo": """
from molecli.catalog.suites import SuiteRow
from molecli.protocols import Example

ROW = SuiteRow("echo", "texts", f"{__name__}:EchoSuite")


class EchoSuite:
    name, version = "echo", "1"

    def tasks(self, data_dir=None):
        return ["once", "twice"]

    known = tasks

    def source(self, task, split, data_dir=None):
        return None

    def load(self, task, split, data_dir=None):
        words = ("fox", "cow", "cat", "dog") if split == "train" else ("horse", "bear")
        return [Example(task, f"{task}: old {word}", " ".join([word] * (1 + (task == "twice")))) for word in words]

    def metrics(self, task):
        return ("exact_match", "vowels")

    def max_new_tokens(self, task):
        return 4
""",
    "postcards": """
from molecli.catalog.suites import SuiteRow
from molecli.protocols import Scene

ROW = SuiteRow("postcards", "scenes", f"{__name__}:Postcards", given=("split",))


class Postcards:
    name, version = "postcards", "1"

    def __init__(self, split="test"):
        self.split = split

    def tasks(self, concepts, data_dir=None):
        return ["pairs"]

    def scenes(self, task, concepts, data_dir=None):
        names = tuple(list(concepts)[:2])
        return [Scene(task, "greeting", f"a {names[0]} and a {names[1]} on grass", names, classes=names)]

    def metrics(self, task):
        return ("recognised",)

    def pictures(self, lora, data_dir=None):
        return None
""",
}
POINTS = {
    "molecli.methods": ("halved", "leaning", "latest"),
    "molecli.metrics": ("vowels",),
    "molecli.suites": ("echo", "postcards"),
}
DRIVER = """
import contextlib, io, json, os, sys
from molecli.cli.app import run
for request in sys.stdin:
    folder, line = json.loads(request)
    os.chdir(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(line)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def install(folder: Path, points: dict[str, tuple[str, ...]]) -> None:
    """Writes what pip leaves of a package `mine` into the folder."""
    info = folder / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    groups = (f"[{group}]\n" + "".join(f"{name} = {name}:ROW\n" for name in names) for group, names in points.items())
    (info / "entry_points.txt").write_text("\n".join(groups))


@pytest.fixture(scope="module")
def mole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Ran]]]:
    """`mole(folder, "compose --mode halved", ...)` -> what each command line did, with the package installed.

    One process runs them all: it imports torch once.
    """
    site = tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        (site / f"{name}.py").write_text(text)
    install(site, POINTS)
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def run(folder: Path, *lines: str) -> list[Ran]:
            assert process.stdin is not None
            assert process.stdout is not None
            found = []
            for line in lines:
                process.stdin.write(json.dumps([str(folder), line.split()]) + "\n")
                process.stdin.flush()
                found.append(Ran(*json.loads(process.stdout.readline())))
            return found

        yield run
        process.stdin.close()  # type: ignore[union-attr]


def test_they_are_choices_and_stand_in_the_help(mole: Callable[..., list[Ran]], tmp_path: Path) -> None:
    compose, evaluate, wrong = mole(tmp_path, "compose --help", "evaluate --help", "compose --mode halfed")
    words = re.findall(r"\w+", compose.out)
    for name in POINTS["molecli.methods"]:
        assert words.count(name) >= 2, name  # among the choices, and in the sentence that lists them
    said = " ".join(evaluate.out.split())
    for name in ("halved", "latest", "vowels", "echo", "postcards"):
        assert name in said
    assert wrong.code == 2
    assert "Did you mean 'halved'?" in wrong.err


def test_an_option_that_a_mode_does_not_read_is_refused(mole: Callable[..., list[Ran]], tmp_path: Path) -> None:
    others, own, bad, rates = mole(
        tmp_path,
        "compose --loras a,b --mode ties --set method.divisor=3",
        "compose --loras a,b --mode halved --set method.density=0.5",
        "compose --loras a,b --mode halved --set method.divisor=0",
        "compose --loras a,b --mode latest",
    )
    assert (others.code, own.code, bad.code, rates.code) == (2, 2, 2, 2)
    assert "method.divisor: mode ties does not read it." in others.err
    assert others.err.endswith("divisor is for halved.\n")
    assert "It reads scale, rank, divisor, layers" in own.err
    assert "it must be greater than 0" in bad.err
    assert "--mode latest: it acts on denoising steps, and the base is a language model." in rates.err


def test_methods_on_a_language_model_are_planned_and_run(mole: Callable[..., list[Ran]], tmp_path: Path) -> None:
    plan, halved, plain, learned, looked, scored = mole(
        tmp_path,
        "compose --loras a,b --mode halved --no-evaluate --dry-run --json",
        "compose --loras a,b --mode halved --no-evaluate --set method.divisor=4 --output halved",
        "compose --loras a,b --mode cat --no-evaluate --output cat",
        "compose --loras a,b --mode leaning --steps 2 --suite echo --batch-size 2 --output leaning --json",
        "inspect-gates leaning --json",
        "evaluate halved leaning --suite echo --modes base,halved --metrics vowels,exact_match --output scores --json",
    )
    assert [ran.code for ran in (plan, halved, plain, learned, looked, scored)] == [0] * 6, learned.err
    assert json.loads(plan.out)["mode"] == "halved"
    from safetensors.torch import load_file

    quarter, whole = (load_file(tmp_path / name / "composition.safetensors") for name in ("halved", "cat"))
    assert all(quarter[key].mul(4).allclose(whole[key]) for key in whole if key.endswith("/B"))
    trained = json.loads(learned.out)
    assert (trained["steps"], trained["trained_parameters"]) == (2, 2 * trained["sites"])
    assert json.loads(looked.out)["tasks"] == ["once", "twice"]
    results = json.loads(scored.out)
    assert list(results["methods"]) == ["base", "halved", "halved (2)", "leaning"]
    assert {"vowels,none", "exact_match,none"} < set(results["results"]["once"])
    assert results["metric_versions"] == {"exact_match": "1", "vowels": "1"}


def test_methods_and_scenes_of_pictures_are_planned_and_run(mole: Callable[..., list[Ran]], tmp_path: Path) -> None:
    given = "--base builtin:tiny-sd --loras octopus,cactus --denoise-steps 2"
    evaluate = f"evaluate {given} --suite postcards --modes latest,single --images 1"
    plan, scored, drawn = mole(
        tmp_path,
        f"{evaluate} --dry-run --json",
        f"{evaluate} --output scores --json",
        f"sample {given} --prompt grass --modes latest --order cactus,octopus --output drawn --json",
    )
    assert [ran.code for ran in (plan, scored, drawn)] == [0] * 3, scored.err + drawn.err
    assert json.loads(plan.out)["examples"] == {"evaluate": 3}
    results = json.loads(scored.out)
    assert list(results["methods"]) == ["latest", "octopus", "cactus"]
    assert results["suite"] == "postcards"
    assert [picture["method"] for picture in json.loads(drawn.out)] == ["latest"]


def test_a_study_compares_them(mole: Callable[..., list[Ran]], tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(
        "command: study\n"
        "experts: {loras: 'a,b'}\n"
        "methods: {halved: {tune: {method.divisor: [2, 8]}}, leaning: {train: {steps: 1, batch_size: 2}}}\n"
        "fit: {suite: echo, holdout: 0.5}\n"
        "test: {data: {suite: echo}, metrics: [vowels]}\n"
        "own: false\nwider: 0\n"
    )
    plan, done, refused = mole(
        tmp_path,
        "study study.yaml --dry-run --json",
        "study study.yaml --jobs 2 --output done --json",
        "study study.yaml --set methods.leaning.method.divisor=3 --dry-run",
    )
    assert (plan.code, done.code, refused.code) == (0, 0, 2), done.err
    assert {job["recipe"].get("mode") for job in json.loads(plan.out)} >= {"halved", "leaning"}
    scores = json.loads(done.out)
    assert set(scores["comparisons"]["all"]["comparisons"][0]["methods"]) == {"halved", "leaning"}
    assert [choice["settings"] for choice in scores["tuned"]] in ([{"method.divisor": 2}], [{"method.divisor": 8}])
    assert "methods.leaning.method.divisor: mode leaning does not read it." in refused.err


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import nowhere_at_all\n", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("ROW = 3\n", "mine:ROW is no Method"),
        (FILES["halved"], "the row is called 'halved'"),
        (FILES["halved"].replace('"halved"', '"mine"'), ""),
    ],
)
def test_a_row_that_cannot_be_had_is_left_out_with_a_warning(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    install(tmp_path, {"molecli.methods": ("mine",)})
    code = "from molecli.catalog.methods import METHODS; print('mine' in METHODS, 'ties' in METHODS)"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [str(not why), "True"]
    assert (f"'mine' of the package mine is left out of molecli.methods: {why}" in done.stderr) == bool(why)


def test_a_name_that_ships_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "ties.py").write_text(FILES["halved"].replace('"halved"', '"ties"'))
    install(tmp_path, {"molecli.methods": ("ties",)})
    code = "from molecli.catalog.methods import METHODS; print(METHODS['ties'].paper)"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "TIES, 2306.01708"
    assert "the name is taken" in done.stderr
