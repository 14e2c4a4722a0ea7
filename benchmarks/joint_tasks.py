"""Tasks that need two skills at once, made from instruction_induction's files: the second continues the first's answer.

    python benchmarks/joint_tasks.py --data-dir DATA/instruction_induction --output DATA/joint

Writes train/<task>.jsonl and test/<task>.jsonl with lines of input, target and references, for the suite `jsonl`.
Answers come only from the second task's own files, so nothing is invented; a test row's input is in the first task's
test file.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from molecli.suites.instruction_induction import TASKS

TRAIN_ROWS, TEST_ROWS = 400, 100
SPELLED = "letters_list"
# (first, second) by the task's name.
JOINT = {
    "sum_in_words": ("sum", "num_to_verbal"),
    "difference_in_words": ("diff", "num_to_verbal"),
    "plural_spelled": ("singular_to_plural", SPELLED),
    "antonym_spelled": ("antonyms", SPELLED),
    "larger_animal_spelled": ("larger_animal", SPELLED),
    "larger_animal_first_letter": ("larger_animal", "first_word_letter"),
    "antonym_second_letter": ("antonyms", "second_word_letter"),
    "synonym_in_german": ("synonyms", "translation_en-de"),
}


def rows(data_dir: Path, split: str, task: str) -> list[dict[str, object]]:
    """The lines of one file."""
    return [json.loads(line) for line in (data_dir / split / f"{task}.jsonl").read_text("utf-8").splitlines()]


def answers(data_dir: Path, task: str) -> dict[str, list[str]]:
    """input -> accepted outputs, of both splits; letters are computed from the word."""
    known: dict[str, list[str]] = {}
    for split in ("train", "test"):
        for row in rows(data_dir, split, task):
            others = row.get("possible_translations")
            found = [str(row["output"]), *(map(str, others) if isinstance(others, list) else ())]
            known.setdefault(str(row["input"]).strip(), []).extend(found)
    return known


def second_answer(task: str, known: dict[str, list[str]], word: str) -> list[str]:
    """The second task's output for the first one's answer; None if its files do not have it."""
    if task == SPELLED:
        return [" ".join(word)] if word.isalpha() else []
    if task == "first_word_letter":
        return [word[0]] if word.isalpha() else []
    if task == "second_word_letter":
        return [word[1]] if word.isalpha() and len(word) > 1 else []
    return list(dict.fromkeys(known.get(word, [])))


def joint(data_dir: Path, split: str, first: str, second: str) -> Iterator[dict[str, object]]:
    """Every row of the first task whose answer is an input of the second."""
    known = answers(data_dir, second)
    then = TASKS[second].instruction
    for row in rows(data_dir, split, first):
        text, middle = str(row["input"]).strip(), str(row["output"]).strip()
        found = second_answer(second, known, middle)
        if found:
            asked = f"{TASKS[first].instruction} Then, of the answer: {then[0].lower()}{then[1:]}"
            prompt = f"{asked}\nInput: {text}\nOutput:"
            yield {"input": prompt, "target": found[0], "references": found}


def write(path: Path, lines: Sequence[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    for name, (first, second) in JOINT.items():
        for split, most in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
            found = list(joint(given.data_dir, split, first, second))
            random.Random(f"{name}/{split}").shuffle(found)
            write(given.output / split / f"{name}.jsonl", found[:most])
            print(f"{split} {name}: {min(len(found), most)} of {len(found)}")


if __name__ == "__main__":
    main()
