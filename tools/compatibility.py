"""Computes the cells of the table of compatibility and writes docs/compatibility.md.

python -m tools.compatibility                                the page; fails and writes nothing if a cell is wrong
python -m tools.compatibility --only llama,t5 --ways static  some rows and columns; the page keeps the others
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from tests.conformance.architectures import ARCHITECTURES
from tests.conformance.cells import Cell, cells_of
from tests.conformance.pipelines import PIPELINE_WAYS, ROWS, Pipeline, pipeline_cells
from tests.conformance.subject import Subject
from tests.conformance.table import PAGE, columns, columns_of, parse, render

Row = dict[str, Mapping[str, Cell]]


def compute(name: str, ways: Sequence[str]) -> Row:
    """The cells of one row by way."""
    with tempfile.TemporaryDirectory() as folder:
        if name in ROWS:
            row = Pipeline(name, Path(folder))
            return {way: pipeline_cells(row, way) for way in ways}
        subject = Subject(ARCHITECTURES[name], Path(folder))
        return {way: cells_of(subject, way) for way in ways}


def _quiet() -> None:
    """Small matrices: several threads in each process would only wait for one another."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()


def rows(chosen: Mapping[str, Sequence[str]], processes: int) -> Iterator[tuple[str, Row]]:
    """Each row as soon as it is computed. chosen: {row: its ways}."""
    if processes == 1:
        _quiet()
        yield from ((name, compute(name, ways)) for name, ways in chosen.items())
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        jobs = {pool.submit(compute, name, ways): name for name, ways in chosen.items()}
        for job in as_completed(jobs):
            yield jobs[job], job.result()


def main(arguments: Sequence[str] | None = None) -> int:
    """1 if a cell is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.compatibility", description=__doc__)
    known = [*ARCHITECTURES, *ROWS], [*columns(), *PIPELINE_WAYS]
    parser.add_argument("--only", help="architectures and pipelines, with commas between; by default all")
    parser.add_argument("--ways", help=f"columns, with commas between; by default all: {', '.join(known[1])}")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="rows computed at the same time")
    parser.add_argument("--show", action="store_true", help="print the cells and write nothing")
    given = parser.parse_args(arguments)
    names, ways = (
        text.split(",") if text else all_ for text, all_ in zip((given.only, given.ways), known, strict=True)
    )
    for some, every in zip((names, ways), known, strict=True):
        unknown = [name for name in some if name not in every]
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(every)}")
    chosen = {name: [way for way in ways if way in columns_of(name)] for name in names}
    chosen = {name: own for name, own in chosen.items() if own}
    results: dict[tuple[str, str], Mapping[str, Cell]] = {}
    if given.only or given.ways:
        results |= parse(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    wrong = 0
    for done, (name, row) in enumerate(rows(chosen, given.processes), start=1):
        results |= {(name, way): cells for way, cells in row.items()}
        faults = [
            f"{name}, {columns_of(name)[way]}, {mode}: {cell.words}"
            for way, cells in row.items()
            for mode, cell in cells.items()
            if cell.state == "wrong"
        ]
        wrong += len(faults)
        print(*faults, f"{done}/{len(chosen)} {name}", sep="\n", file=sys.stderr, flush=True)
    if given.show:
        for name, way in ((name, way) for name, own in chosen.items() for way in own):
            for mode, cell in results[name, way].items():
                print(f"{name}, {columns_of(name)[way]}, {mode}: {cell.state} {cell.words}".rstrip())
    if wrong:
        print(f"{wrong} cells are wrong; {PAGE.name} was not written", file=sys.stderr)
    elif not given.show:
        PAGE.write_text(render(results), encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
