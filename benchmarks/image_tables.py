"""The results of `image_cost.py` as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MIB = 2**20


def tables(result: dict[str, Any]) -> str:
    """The facts about the measurement, the table of a training step if there is one, and the table of steps."""
    pixels, rows = result["pixels"], 2 * result["batch"]
    lines = [
        f"{result['device']}, {result['threads']} threads, {result['dtype']}, {result['versions']}",
        f"shape {result['shape']} at {pixels}x{pixels}, {rows} rows in the UNet (guidance), LoRAs on "
        f"{', '.join(result['parts'])}, rank {result['rank']}, seed {result['seed']}; "
        f"{len(result['rows'][0]['times_s'])} rounds of {result['steps']} steps by {result['clock']} time; "
        f"{result['seconds']:.0f} s in all",
        "every step replayed from a record of it; memory without" if result["replay"] else "every step call by call",
    ]
    if result["note"]:
        lines.append(result["note"])
    if result["training"]:
        lines += [
            "",
            f"A training step of gates over 3 LoRAs (the base: forward and backward), 2 x {pixels}x{pixels}:",
            "",
        ]
        heads = ("method", "checkpointing", "ms", "x base", "peak beyond weights MiB")
        lines += _table(heads, [_training_cells(row) for row in result["training"]])
    lines += ["", "One denoising step; memory for a whole picture, of 2 steps and the VAE's decoding:", ""]
    heads = ("method", "LoRAs", "ms", "x base", "x its single passes", "target")
    heads += ("weights MiB", "peak beyond, denoising MiB", "peak in all, picture MiB")
    lines += _table(heads, [_cells(row) for row in result["rows"]])
    return "\n".join(lines) + "\n"


def _training_cells(row: dict[str, Any]) -> list[str]:
    memory = f"{row['memory'] / MIB:.0f}"
    return [
        row["method"],
        "yes" if row["checkpointed"] else "no",
        f"{row['ms']:.1f}",
        f"{row['times_base']:.2f}",
        memory,
    ]


def _cells(row: dict[str, Any]) -> list[str]:
    passes = f"{row['times_passes']:.3f} of {row['passes']}" if "times_passes" in row else "-"
    target = "-"
    if "target" in row:
        name = "base" if row["target"]["of"] == "times_base" else "passes"
        target = f"<= {row['target']['most']} {name}: {'PASS' if row['target']['met'] else 'MISS'}"
    cells = [row["method"], str(row["loras"]), f"{row['ms']:.1f}", f"{row['times_base']:.3f}", passes, target]
    weights, memory = row["weights"], row["memory"]
    cells.append(f"{weights / MIB:.1f}")
    if not memory:
        return [*cells, "-", "-"]
    return [*cells, f"{memory['denoising'] / MIB:.1f}", f"{(weights + memory['picture']) / MIB:.1f}"]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [list(heads), ["-" * len(head) for head in heads], *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    cells[1] = ["-" * width for width in widths]
    return ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
