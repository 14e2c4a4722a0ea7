"""Builds the embedded default: the tiny T5 in molecli/builtin/tiny-t5 and one LoRA per skill in molecli/builtin/loras.

    python tools/text_builtin.py --device cuda --jobs 5          # what is shipped
    python tools/text_builtin.py --smoke --output /tmp/builtin   # every step of it, briefly

The base learns to copy and reorder sentences, to translate into German and Spanish, to read French and plurals, and to
do two of these at once, so that its layers separate *which words* from *which order*. It never sees a skill of
`molecli.suites.builtin`. Each LoRA learns one skill, alone and combined with operations that the base knows, never with
another LoRA's skill. Test sentences do not occur in training. It prints exact match of the base and of every LoRA.

In this file: the base's operations, the training pool, the tokenizer and model, training, scoring, the run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from molecli.suites._builtin_words import ADJECTIVES, NOUNS, VERBS, rows
from molecli.suites.builtin import (
    FRENCH,
    GERMAN,
    PLURAL,
    SKILLS,
    SPANISH,
    BuiltinSuite,
    Operation,
    Words,
    sentence,
    split_of,
    translated,
)

SEED = 20260101
BASE_ID = "builtin:tiny-t5"
PROMPT_LENGTH, TARGET_LENGTH = 10, 11

# None has a skill's name or function, except that `exchange` reverses a sentence of three words.
ORDERS: dict[str, Operation] = {
    "copy": lambda w: w,
    "rotate": lambda w: w[1:] + w[:1],
    "back": lambda w: w[-1:] + w[:-1],
    "swap": lambda w: (w[1], w[0], *w[2:]),
    "end": lambda w: (*w[:-2], w[-1], w[-2]),
    "exchange": lambda w: (w[-1], *w[1:-1], w[0]),
    "first": lambda w: w[:1],
    "last": lambda w: w[-1:],
    "rest": lambda w: w[1:],
    "most": lambda w: w[:-1],
    "repeat": lambda w: w + w,
    "again": lambda w: (*w, w[-1]),
}
_inverse = {foreign: word for table in (FRENCH, GERMAN, SPANISH) for word, foreign in table.items()}
LEXICAL: dict[str, Operation] = {
    "german": translated(GERMAN),
    "spanish": translated(SPANISH),
    "english": translated(_inverse),
    "singular": translated({many: one for one, many in PLURAL.items()}),
}
FOREIGN: tuple[Operation, ...] = (translated(FRENCH), translated(GERMAN), translated(SPANISH))
ORDER_SKILLS = ("reverse", "double")
LONG_ORDERS = [name for name in ORDERS if name not in ("first", "last")]
OPERATIONS: dict[str, Operation] = {**ORDERS, **LEXICAL, **SKILLS}


def train_sentence(rng: random.Random) -> Words:
    """A sentence that no test uses."""
    while split_of(words := sentence(rng)) == "test":
        pass
    return words


def base_example(rng: random.Random) -> tuple[Words, Words]:
    """Prompt words and target words of one pretraining example: one operation, or two of them composed."""
    kind, order, lexical = rng.random(), rng.choice(list(ORDERS)), rng.choice(list(LEXICAL))
    if kind < 0.25:
        names = [order]
    elif kind < 0.45:
        names = [lexical]
    elif kind < 0.85:
        names = [order, lexical]
    else:
        names = [order, rng.choice(LONG_ORDERS)]
    return applied(names, rng)


def skill_example(rng: random.Random, skill: str, composed: float) -> tuple[Words, Words]:
    """One example of a skill; a share of them is combined with an operation of the base."""
    if rng.random() >= composed:
        return applied([skill], rng)
    if skill in ORDER_SKILLS:
        return applied([skill, rng.choice(list(LEXICAL))], rng)
    return applied([rng.choice(list(ORDERS)), skill], rng)


def applied(names: list[str], rng: random.Random) -> tuple[Words, Words]:
    """Prompt words and target words of the named operations, applied from right to left to a suitable sentence."""
    words = train_sentence(rng)
    draw = rng.random()
    reorders_only = not set(names) - set(ORDERS)
    if "english" in names or (reorders_only and draw < 0.4):
        words = rng.choice(FOREIGN)(words)
    elif "singular" in names or (reorders_only and draw < 0.6):
        words = translated(PLURAL)(words)
    target = words
    for name in reversed(names):
        target = OPERATIONS[name](target)
    # A sentence that is doubled twice would be too long for a target.
    return ((*names, ":", *words), target) if len(target) < TARGET_LENGTH else applied(names[:1], rng)


def vocabulary() -> list[str]:
    """Every token in the order of ids. T5 starts decoding from id 0, the padding."""
    words = [word for table in (NOUNS, VERBS, ADJECTIVES) for row in rows(table) for word in row]
    return ["<pad>", "</s>", "<unk>", ":", *SKILLS, *ORDERS, *LEXICAL, *words]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ends every text with </s>."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Plan:
    """Sizes and budgets of one build. `composed` is the share of a LoRA's examples that add a base operation."""

    width: int = 128
    layers: int = 4
    feed_forward: int = 512
    pool: int = 400_000
    batch: int = 2048
    base_steps: int = 3500
    base_lr: float = 2e-3
    lora_steps: int = 400
    lora_lr: float = 4e-3
    composed: float = 0.5


FULL = Plan()
SMOKE = Plan(width=64, layers=2, feed_forward=128, pool=5000, batch=64, base_steps=40, lora_steps=10)


def build_model(plan: Plan) -> T5ForConditionalGeneration:
    """A T5 with random weights."""
    width, layers = plan.width, plan.layers
    config = T5Config(
        vocab_size=len(vocabulary()),
        d_model=width,
        d_kv=32,
        d_ff=plan.feed_forward,
        num_heads=width // 32,
        num_layers=layers,
        num_decoder_layers=layers,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=24,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


@dataclass(frozen=True)
class Pool:
    """Encoded examples, one per row."""

    prompts: torch.Tensor
    labels: torch.Tensor

    def batch(self, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Model inputs of randomly drawn rows."""
        index = torch.randint(len(self.prompts), (size,), generator=generator).to(self.prompts.device)
        ids, labels = self.prompts[index], self.labels[index]
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels.masked_fill(labels == 0, -100)}


def encode(examples: Iterable[tuple[Words, Words]], device: str) -> Pool:
    """A pool of padded ids, each ending in </s>."""
    ids = {word: i for i, word in enumerate(vocabulary())}

    def padded(words: Words, length: int) -> list[int]:
        return [*(ids[word] for word in words), 1] + [0] * (length - len(words) - 1)

    pairs = list(examples)
    prompts = torch.tensor([padded(prompt, PROMPT_LENGTH) for prompt, _ in pairs])
    labels = torch.tensor([padded(target, TARGET_LENGTH) for _, target in pairs])
    return Pool(prompts.to(device), labels.to(device))


def train(model: torch.nn.Module, pool: Pool, *, steps: int, batch: int, lr: float, seed: int, label: str) -> None:
    """Trains the parameters that require grad, in place, with AdamW and a cosine schedule with warm-up."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, lr * 0.02),
        ],
        [warmup],
    )
    generator = torch.Generator().manual_seed(seed)
    start = time.time()
    for step in range(1, steps + 1):
        loss = model(**pool.batch(batch, generator)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 5) == 0:
            print(f"{label} step {step}/{steps} loss {loss.item():.4f} {time.time() - start:.0f} s", flush=True)


def train_base(plan: Plan, device: str) -> T5ForConditionalGeneration:
    """The pretrained base."""
    torch.manual_seed(SEED)
    model, rng = build_model(plan).to(device), random.Random(f"{SEED}/base")
    pool = encode((base_example(rng) for _ in range(plan.pool)), device)
    train(model, pool, steps=plan.base_steps, batch=plan.batch, lr=plan.base_lr, seed=SEED, label="base")
    return model


def train_lora(base: T5ForConditionalGeneration, skill: str, plan: Plan, device: str) -> PeftModel:
    """The base with a LoRA trained on one skill."""
    seed = SEED + 1 + list(SKILLS).index(skill)
    torch.manual_seed(seed)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    model, rng = get_peft_model(base, settings), random.Random(f"{SEED}/{skill}")
    pool = encode((skill_example(rng, skill, plan.composed) for _ in range(plan.pool // 10)), device)
    train(model, pool, steps=plan.lora_steps, batch=plan.batch // 4, lr=plan.lora_lr, seed=seed, label=skill)
    return model.eval()


def load_base(output: Path, device: str) -> T5ForConditionalGeneration:
    """The base as it is shipped (float16 values, loaded in float32), on which LoRAs are trained."""
    return T5ForConditionalGeneration.from_pretrained(base_folder(output), dtype=torch.float32).to(device).eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, task: str) -> float:
    """Exact match, in percent, on the test rows of one task."""
    suite, tokenizer = BuiltinSuite(), build_tokenizer()
    examples = suite.load(task, "test")
    inputs = tokenizer([example.prompt for example in examples], return_tensors="pt", padding=True)
    inputs = {name: inputs[name].to(next(model.parameters()).device) for name in ("input_ids", "attention_mask")}
    output = model.generate(**inputs, max_new_tokens=suite.max_new_tokens(task), do_sample=False)
    said = tokenizer.batch_decode(output, skip_special_tokens=True)
    return 100 * sum(a == example.target for a, example in zip(said, examples, strict=True)) / len(examples)


def save_base(model: T5ForConditionalGeneration, folder: Path) -> None:
    """Writes the base in float16. Its config makes loaders use float32, which is fastest on CPUs."""
    model.half().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    edit_json(folder / "config.json", dtype="float32")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def save_lora(model: PeftModel, folder: Path) -> None:
    """Writes one adapter like PEFT, in float16, and without parts that differ between builds."""
    settings = model.peft_config["default"]
    settings.base_model_name_or_path, settings.inference_mode = BASE_ID, True
    model.half().save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").chmod(0o644)
    edit_json(folder / "adapter_config.json", target_modules=sorted(settings.target_modules))


def edit_json(path: Path, **changes: object) -> None:
    """Sets top-level keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2, sort_keys=True) + "\n")


def print_table(rows: dict[str, list[float]], tasks: list[str]) -> None:
    """Prints exact match, one model per line and one task per column."""
    print(" " * 10 + "".join(f"{task:>18}" for task in tasks))
    for name, scores in rows.items():
        print(f"{name:10}" + "".join(f"{score:18.1f}" for score in scores), flush=True)


def base_folder(output: Path) -> Path:
    """The folder of the base."""
    return output / BASE_ID.removeprefix("builtin:")


def build_lora(skill: str, plan: Plan, device: str, output: Path) -> list[float]:
    """Trains and writes one LoRA; its scores on every task."""
    prepare(device)
    lora = train_lora(load_base(output, device), skill, plan, device)
    save_lora(lora, output / "loras" / skill)
    return [accuracy(lora.float(), task) for task in BuiltinSuite().tasks()]


def prepare(device: str) -> None:
    """Process-wide settings."""
    torch.set_float32_matmul_precision("high")
    transformers.logging.disable_progress_bar()
    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def main() -> None:
    """Builds everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "molecli" / "builtin")
    parser.add_argument("--smoke", action="store_true", help="under a minute of training, to see that every step runs")
    parser.add_argument("--reuse-base", action="store_true", help="keep the base in --output and train only the LoRAs")
    parser.add_argument("--jobs", type=int, default=1, help="LoRAs trained at the same time, each in its own process")
    parser.add_argument("--composed", type=float, default=FULL.composed, help="share of composed LoRA examples")
    options = parser.parse_args()
    plan = replace(SMOKE if options.smoke else FULL, composed=options.composed)
    prepare(options.device)
    if not options.reuse_base:
        save_base(train_base(plan, options.device), base_folder(options.output))
    base = load_base(options.output, options.device)
    print(f"base: {base.num_parameters():,} parameters", flush=True)
    tasks = BuiltinSuite().tasks()
    scores = {"base": [accuracy(base, task) for task in tasks]}
    work = partial(build_lora, plan=plan, device=options.device, output=options.output)
    if options.jobs == 1:
        results = list(map(work, SKILLS))
    else:
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as workers:
            results = list(workers.map(work, SKILLS))
    print_table(scores | dict(zip(SKILLS, results, strict=True)), tasks)
    print(f"{sum(f.stat().st_size for f in options.output.rglob('*') if f.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
