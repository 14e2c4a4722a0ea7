"""Packs the results of a build into a few small files, and unpacks such files into the package."""

from __future__ import annotations

import tarfile
from pathlib import Path

GROUPS = {"tiny-sd.tar": ("tiny-sd",), "scorers.tar": ("tiny-clip", "recogniser", "vae", "tokenizer")}
LIMIT = 16 * 2**20


def export(work: Path, target: Path) -> list[str]:
    """One line for each archive, after writing the contents of `work` to archives of less than 16 MiB."""
    target.mkdir(parents=True, exist_ok=True)
    lines = []
    for archive, folders in GROUPS.items():
        there = [folder for folder in folders if (work / folder).is_dir()]
        if not there:
            continue
        part = target / f"{archive}.part"
        with tarfile.open(part, "w") as tar:
            for folder in there:
                tar.add(work / folder, arcname=folder)
        part.replace(target / archive)
        size = (target / archive).stat().st_size
        lines.append(f"{archive}: {', '.join(there)}, {size / 2**20:.1f} MiB" + (" TOO BIG" if size > LIMIT else ""))
    return lines


def install(source: Path, package: Path) -> None:
    """Unpacks the archives into a folder such as molecli/builtin, without the separate autoencoder and tokenizer."""
    for archive in GROUPS:
        if (source / archive).is_file():
            with tarfile.open(source / archive) as tar:
                members = [m for m in tar.getmembers() if m.name.split("/")[0] not in ("vae", "tokenizer")]
                tar.extractall(package, members=members, filter="data")
