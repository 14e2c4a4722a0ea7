"""What the commands do, recorded so that a change of structure can be held against it, bit for bit.

    python benchmarks/behaviour.py record BEFORE.json             every case, on the embedded models, on one CPU thread
    python benchmarks/behaviour.py compare BEFORE.json AFTER.json        where the two differ; exits with 1 if they do

A case is one command line. Kept of it: the exit code, the JSON document on stdout, and every file that it wrote: of
safetensors each tensor's digest and the metadata, of pictures the digest of their pixels and their text, of JSON and
YAML the content. Times are left out, and a picture's digest, which follows from the bytes of a composition's file:
their order is not fixed. Numbers are those of one machine and one version of PyTorch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import molecli

SUMS = ("linear", "merge", "nla")
MERGES = ("cat", "svd", "magnitude_prune", "ties", "dare", "dare_ties", "knots", "tsv", "iso", "svdiff")
OUTPUTS = ("switch", "composite", "w_switch", "w_composite", "loratorio")
GATES = {
    "layer": "",
    "network": "--granularity network",
    "block": "--granularity block --gate-input experts",
    "matrix": "--granularity matrix --pool token",
    "none": "--gate-input none --top-k 2",
    "running": "--pool running --head per_expert",
    "low_rank": "--head low_rank --set gate.normalize=unit --set gate.absent=renormalize",
    "random": "--set gate.init_std=0.1 --set gate.learn_temperature=false --set gate.normalize=none",
    "paper": "--preset paper --set train.steps=3",
    "few-shot": "--preset few-shot --set train.steps=3",
    "layers": "--set method.layers=0-50",
}
PICTURES = "--base builtin:tiny-sd --loras octopus,cactus,teapot"
STRANGE = {
    "no such mode": "compose --loras a,b --mode gatted",
    "no such LoRA": "compose --loras a,nobody --mode linear",
    "no such suite": "evaluate --suite bbhh",
    "no such metric": "evaluate --loras a --set eval.metrics=exact",
    "unread option": "compose --loras a,b --mode ties --set method.tau=3",
    "unread option of pictures": f"compose {PICTURES} --mode switch --set method.density=0.5",
    "steps on text": "compose --loras a,b --mode switch",
    "PEFT on pictures": f"compose {PICTURES} --mode arrow",
    "pictures on text": "compose --loras a,b --preview nla",
    "text on pictures": f"compose {PICTURES} --files x.jsonl",
    "X-LoRA on T5": "compose --loras a,b --mode xlora --no-evaluate",
    "not a key": "compose --loras a,b --set gate.granulrity=layer",
    "gates of a sum": "inspect-gates text/linear",
    "export of turns": "export pictures/switch",
    "kohya on text": "export text/linear --format kohya",
    "sheet on text": "sample text/linear --prompt hello --modes nla",
    "tokens on pictures": "sample pictures/linear --prompt hello --set max_new_tokens=3",
    "mask of nobody": "sample text/linear --prompt hello --mask nobody",
    "all masked": "inspect-gates text/gated-layer --mask french,reverse,opposite",
    "preset of text": f"compose {PICTURES} --preset few-shot",
    "suite of pictures": "evaluate text/linear --suite emoji",
    "suite of text": "evaluate pictures/linear --suite bbh",
    "metric of pictures": "evaluate text/linear --set eval.metrics=recognised",
}


def cases() -> Iterator[tuple[str, str]]:
    """(name, command line) of each case; the name is the folder that it writes, and later ones read it."""
    yield from _texts()
    yield from _pictures()
    for name, line in (
        ("compose", "compose --loras a,b,c --mode gated"),
        ("xlora", "compose --loras a,b,c --mode lorahub"),
        ("pictures", f"compose {PICTURES} --mode gated"),
        ("evaluate", "evaluate text/gated-layer --modes base,single,ties"),
        ("evaluate-pictures", "evaluate pictures/gated --suite emoji --modes base,switch,composite"),
        ("train-lora", "train-lora --tasks french"),
        ("train-lora-pictures", "train-lora --base builtin:tiny-sd --instance-dir BUILTIN/emoji/octopus"),
        ("export", "export text/gated-layer"),
        ("study", "study study.yaml"),
        ("study-paper", "study paper/table4"),
    ):
        yield f"plan/{name}", f"{line} --dry-run"
    yield "study/text", "study study.yaml --jobs 1"
    yield "study/pictures", "study pictures.yaml --jobs 1"
    yield "recipe/ls", "recipe ls"
    for name, line in STRANGE.items():
        yield f"strange/{name}", line


def _texts() -> Iterator[tuple[str, str]]:
    few = "--steps 3 --batch-size 4 --limit 16 --eval-limit 4 --set evaluate.bootstrap=50"
    for name, flags in GATES.items():
        yield f"text/gated-{name}", f"compose --loras a,b,c --mode gated {few} {flags}"
    yield "text/soup", f"compose --loras a,b,c --mode soup {few}"
    yield "text/lorahub", "compose --loras a,b,c --mode lorahub --limit 8 --no-evaluate --set method.evaluations=3"
    yield (
        "text/lorahub-updates",
        (
            "compose --loras a,b,c --mode lorahub --no-evaluate --set method.evaluations=3 --set method.on=updates "
            "--set method.examples=8"
        ),
    )
    yield "text/arrow", "compose --loras a,b,c --mode arrow --eval-limit 4 --set method.top_k=2"
    yield "text/pem", "compose --loras a,b,c --mode pem --expression 'french + reverse - opposite' --eval-limit 4"
    yield "text/single", "compose --loras a,b,c --mode single --only reverse --eval-limit 4"
    for mode in SUMS:
        scaled = "" if mode == "nla" else "--scale 1.5"  # a scale cancels there
        yield f"text/{mode}", f"compose --loras a@0.5,b,c --mode {mode} --no-evaluate {scaled}"
    for mode in MERGES:
        yield f"text/{mode}", f"compose --loras a@0.5,b,c --mode {mode} --no-evaluate"
    yield "text/ties-rank", "compose --loras a,b,c --mode ties --rank 4 --density 0.5 --scale 0.7 --eval-limit 4"
    for name in ("gated-layer", "linear", "ties", "arrow"):
        yield (
            f"sample/{name}",
            f"sample text/{name} --prompt 'french: old fox runs' --prompt 'reverse: small cat sleeps'",
        )
    yield "sample/warm", "sample text/gated-layer --prompt 'french: old fox runs' --temperature 1 --mask reverse"
    yield "sample/lora", "sample --loras a --prompt 'french: old fox runs'"
    yield "sample/base", "sample --prompt 'french: old fox runs'"
    yield (
        "evaluate/text",
        (
            "evaluate text/gated-layer text/ties --modes base,single,linear,nla,svd,pem,arrow --limit 4 --mask french "
            "--mask '' --expression 'french - reverse' --set eval.bootstrap=50"
        ),
    )
    yield (
        "evaluate/usual",
        "evaluate text/gated-layer --limit 4 --set eval.bootstrap=50 --set eval.metrics=f1,bleu,rougeL",
    )
    yield "evaluate/base", "evaluate --suite builtin --limit 4"
    yield "inspect/text", "inspect-gates text/gated-layer --limit 4"
    for name in ("gated-layer", "linear", "ties", "gated-none"):
        yield f"export/{name}", f"export text/{name} --verify --set calibration.limit=4"
    yield "export/rank", "export text/gated-layer --rank 4 --dtype bfloat16 --mask french --set calibration.limit=4"
    yield "lora/text", "train-lora --tasks french --steps 2 --batch-size 4 --limit 8"
    yield "lora/svdiff", "train-lora --method svdiff --tasks french --steps 2 --batch-size 4 --limit 8"


def _pictures() -> Iterator[tuple[str, str]]:
    small = f"{PICTURES} --denoise-steps 3 --steps 2 --batch-size 2"
    yield "pictures/gated", f"compose {small} --mode gated --collage 0.5"
    yield "pictures/gated-mean", f"compose {small} --mode gated --pool mean --granularity block --no-preview"
    yield "pictures/gated-clip", f"compose {small} --mode gated --denoise 0 --clip 1 --clip-local 0.5 --no-preview"
    yield "pictures/gated-paper", f"compose {small} --mode gated --preset paper --no-preview --set image.steps=3"
    yield "pictures/soup", f"compose {small} --mode soup --no-preview"
    yield (
        "pictures/lorahub",
        f"compose {PICTURES} --mode lorahub --no-preview --set method.evaluations=2 --set method.examples=2",
    )
    for mode in (*SUMS, *MERGES, *OUTPUTS):
        yield f"pictures/{mode}", f"compose {PICTURES} --mode {mode} --no-preview"
    yield "pictures/single", f"compose {PICTURES} --mode single --only octopus --no-preview"
    yield "pictures/pem", f"compose {PICTURES} --mode pem --expression 'octopus - cactus' --no-preview"
    yield "pictures/shown", f"compose {PICTURES} --mode switch --tau 1 --preview single,nla,composite --denoise-steps 3"
    draw = "--prompt 'an octopus and a cactus on grass' --denoise-steps 3 --batch-size 2"
    yield (
        "sample/pictures",
        (
            f"sample pictures/gated {draw} --images 2 --mask teapot "
            f"--modes base,single,linear,nla,ties,{','.join(OUTPUTS)}"
        ),
    )
    for mode in (*OUTPUTS, "linear", "iso"):
        yield f"sample/pictures-{mode}", f"sample pictures/{mode} {draw}"
    yield (
        "evaluate/pictures",
        (
            "evaluate pictures/gated --suite emoji --tasks '2 LoRAs' --limit 2 --modes base,linear,switch "
            "--denoise-steps 2 "
            "--set eval.images=1 --set eval.bootstrap=50"
        ),
    )
    yield "inspect/pictures", "inspect-gates pictures/gated --denoise-steps 2"
    yield "export/pictures", "export pictures/gated --set calibration.limit=1 --verify"
    yield "export/kohya", "export pictures/ties --format kohya --rank 4 --dtype float16"
    pictures = "train-lora --base builtin:tiny-sd --instance-dir BUILTIN/emoji/octopus --steps 2 --batch-size 2"
    yield "lora/pictures", f"{pictures} --instance-prompt 'a picture of an octopus'"
    yield "lora/pictures-svdiff", f"{pictures} --instance-prompt 'a picture of an octopus' --method svdiff"


STUDY = """
command: study
experts: {data: {tasks: [french, reverse], limit: 8}, train: {steps: 2, batch_size: 4}}
methods:
  linear: {}
  gated: {train: {steps: 2, batch_size: 4}}
  scaled ties: {mode: ties, tune: {method.scale: [0.5, 1]}}
fit: {limit: 8, holdout: 0.5}
test: {data: {limit: 4}}
gates: true
"""
PICTURE_STUDY = """
command: study
base: builtin:tiny-sd
experts: {loras: "octopus,cactus,teapot"}
methods:
  switch: {}
  gated: {train: {steps: 1, batch_size: 2}}
image: {steps: 2}
test: {data: {suite: emoji, tasks: ["3 LoRAs"], limit: 1}, images: 1}
"""


def record(only: str = "") -> dict[str, Any]:
    """name -> what the command did, of the cases whose name begins with `only`."""
    import shlex

    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        Path("study.yaml").write_text(STUDY)
        Path("pictures.yaml").write_text(PICTURE_STUDY)
        os.symlink(Path(molecli.__file__).parent / "builtin", "BUILTIN")
        for name, line in cases():
            if not name.startswith(tuple(only.split(","))):
                continue
            start = time.monotonic()
            found[name] = _run(name, shlex.split(line))
            seconds = time.monotonic() - start
            print(f"{seconds:6.1f} s  {name}  {found[name]['code']}", file=sys.stderr, flush=True)
    return found


def _run(name: str, arguments: list[str]) -> dict[str, Any]:
    from molecli.cli.app import run

    writes = arguments[0] != "recipe"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([*arguments, "--json", *(("--output", name) if writes else ())])
    shown = out.getvalue()
    return {
        "code": code,
        "document": _plain(json.loads(shown)) if shown.strip() else None,
        "message": err.getvalue().splitlines() if code else [],
        "files": {p.relative_to(name).as_posix(): _content(p) for p in sorted(Path(name).rglob("*")) if p.is_file()},
    }


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return {
                "metadata": {key: _plain(_parsed(text)) for key, text in sorted((file.metadata() or {}).items())},
                "tensors": {
                    key: [str(t.dtype), list(t.shape), _digest(_bytes(t))] for key, t in sorted(tensors.items())
                },
            }
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            return {
                "pixels": _digest(image.tobytes()),
                "text": _plain(dict(sorted(getattr(image, "text", {}).items()))),
            }
    if path.suffix == ".json":
        return _plain(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_plain(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".yaml":
        return _plain(yaml.safe_load(path.read_text()))
    if path.suffix in (".md", ".csv"):
        return path.read_text().splitlines()
    return None  # logs


def _parsed(text: str) -> Any:
    """A value of safetensors' metadata, which are texts, many of them JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _bytes(tensor: Any) -> bytes:
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Without times, and without what names this machine."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if "seconds" not in key and key not in _VOLATILE}
    if isinstance(value, str):
        return value.replace(str(Path(molecli.__file__).parent), "molecli").replace(str(Path.cwd()), ".")
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


_VOLATILE = ("digest", "libraries", "device")


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Each place in which two records differ; of refusals the message is not compared, it may read better."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*before, *after)):
            if key == "message":
                continue
            if key not in before or key not in after:
                yield f"{where}/{key}: only {'before' if key in before else 'after'}"
            else:
                yield from differences(before[key], after[key], f"{where}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for at, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(old, new, f"{where}/{at}")
    elif before != after:
        yield f"{where}: {str(before)[:160]} -> {str(after)[:160]}"


def main(arguments: list[str]) -> int:
    if arguments[0] == "record":
        Path(arguments[1]).write_text(json.dumps(record(*arguments[2:]), indent=1, sort_keys=True) + "\n")
        return 0
    before, after = (json.loads(Path(path).read_text()) for path in arguments[1:3])
    found = list(differences(before, after))
    print("\n".join(found) or f"{len(before)} cases: no difference")
    return bool(found)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
