"""How prompts are written: said once in every run, stored, compared, and changed by flags."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from molecli.bases.loading import load_backbone
from molecli.config import BaseConfig
from molecli.errors import UsageError
from molecli.files.composition import load_composition

Mole = Callable[..., Any]
CHAT = "prompts: the base's chat template"
PROMPTS = ("--prompt", "a b", "--prompt", "hello", "--max-new-tokens", "6")
OTHER = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if loud %}!{% endif %}<|end|>{% endfor %}<|assistant|>"
)


class World(NamedTuple):
    base: Path
    loras: dict[str, Path]
    data: Path
    run: Path


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Callable[..., Path],
    make_tiny: Callable[..., Any],
    make_peft_adapter: Callable[..., Path],
    write_jsonl: Callable[..., Path],
) -> World:
    """A base with a chat template, two LoRAs on it, some examples, and a composition with a system prompt."""
    from molecli.cli.app import run

    root = tmp_path_factory.mktemp("prompts")
    base, model = tiny_folder("llama", chat=True), make_tiny("llama", chat=True).model
    loras = {name: make_peft_adapter(model, root / name, seed=i + 1) for i, name in enumerate("ab")}
    data = write_jsonl(root / "words.jsonl", [("a b", "b a"), ("c d", "d c")])
    made = World(base, loras, data, root / "run")
    assert run([*compose(made, made.run), "--system-prompt", "Be brief.", "--quiet"]) == 0
    return made


def compose(world: World, output: Path, *more: str, loras: dict[str, Path] | None = None) -> list[str]:
    named = ",".join(f"{name}={path}" for name, path in (loras or world.loras).items())
    start = ["compose", "--base", str(world.base), "--loras", named, "--mode", "linear", "--no-evaluate"]
    return [*start, "--output", str(output), *more]


def texts(ran: Any) -> list[str]:
    assert ran.code == 0, ran.err
    return [row["text"] for row in json.loads(ran.out)]


def test_every_command_says_the_format_once(mole: Mole, world: World, tmp_path: Path) -> None:
    scored = ("--files", str(world.data), "--max-new-tokens", "4", "--bootstrap", "10")
    commands = {
        "train": ["train-lora", "--base", str(world.base), *scored[:2], "--steps", "1", "--batch-size", "2"],
        "compose": compose(world, tmp_path / "compose")[:-2],
        "evaluate": ["evaluate", "--base", str(world.base), *scored],
    }
    for name, arguments in commands.items():
        ran = mole(*arguments, "--output", tmp_path / name)
        assert ran.code == 0, ran.err
        assert [line for line in ran.err.splitlines() if "prompts" in line] == [CHAT], name
    ran = mole("sample", "--base", world.base, *PROMPTS, "--no-chat-template")
    assert ran.err == "prompts: plain text (--no-chat-template)\n"
    own = f'{CHAT}, system prompt "Be brief."\n'
    assert mole("sample", world.run, *PROMPTS).err == own
    assert mole("export", world.run, "--calibrate", world.data, "--output", tmp_path / "export").err.startswith(own)
    assert "prompts" not in mole("export", world.run, "--output", tmp_path / "unread").err


def test_a_composition_and_a_lora_keep_their_format(mole: Mole, world: World, tmp_path: Path) -> None:
    record = load_composition(world.run).settings["prompts"]
    assert (record["system_prompt"], record["template_args"], len(record["template"])) == ("Be brief.", {}, 64)
    assert yaml.safe_load((world.run / "recipe.yaml").read_text())["base"]["system_prompt"] == "Be brief."
    arguments = ["train-lora", "--base", str(world.base), "--files", str(world.data), "--steps", "1"]
    assert mole(*arguments, "--no-chat-template", "--output", tmp_path / "plain").code == 0
    assert json.loads((tmp_path / "plain" / "report.json").read_text())["prompts"]["template"] is None
    ran = mole(*compose(world, tmp_path / "run", loras={"plain": tmp_path / "plain"}))
    assert ran.err.splitlines()[:2] == [CHAT, "plain: it was trained with prompts in plain text"]


def test_a_composition_is_used_in_its_own_format_unless_another_is_named(mole: Mole, world: World) -> None:
    own = texts(mole("sample", world.run, *PROMPTS, "--json"))
    assert own == texts(mole("sample", world.run, *PROMPTS, "--json", "--system-prompt", "Be brief."))
    assert own == texts(mole("sample", world.run, "--base", world.base, *PROMPTS, "--json"))
    message = (
        f'{world.run}: it was made with prompts in the base\'s chat template, system prompt "Be brief.", '
        'and this run uses the base\'s chat template, system prompt "Be loud."'
    )
    with pytest.warns(UserWarning, match="it was made with") as told:
        other = mole("sample", world.run, *PROMPTS, "--json", "--system-prompt", "Be loud.")
    assert [str(one.message) for one in told] == [message]
    assert texts(other) != own


def test_flags_change_the_base_of_a_recipes_composition(mole: Mole, world: World, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"command": "sample", "composition": str(world.run), "prompts": ["a b", "hello"]}))
    given = (str(recipe), "--max-new-tokens", "6", "--json")
    own = texts(mole("sample", *given))
    assert own == texts(mole("sample", *given, "--dtype", "float32"))
    assert own == texts(mole("sample", *given, "--set", "base.dtype=float32"))
    with pytest.warns(UserWarning, match="it was made with"):
        other = texts(mole("sample", *given, "--system-prompt", "Be loud."))
    assert own != other


def test_evaluating_in_another_format_names_both(mole: Mole, world: World, tmp_path: Path) -> None:
    arguments = ("evaluate", world.run, "--files", world.data, "--max-new-tokens", "4", "--bootstrap", "0")
    assert "made with" not in mole(*arguments, "--output", tmp_path / "own").err
    with pytest.warns(UserWarning, match=r"run: it was made with prompts in .*brief.*, and this run uses plain text"):
        ran = mole(*arguments, "--no-chat-template", "--set", "base.system_prompt=null", "--output", tmp_path / "other")
    assert ran.code == 0


def test_a_loras_own_template_is_noticed_and_can_be_used(mole: Mole, world: World, tmp_path: Path) -> None:
    lora = tmp_path / "own"
    shutil.copytree(world.loras["a"], lora)
    arguments = ("sample", "--base", str(world.base), "--loras", f"own={lora}", *PROMPTS, "--json")
    same = yaml.safe_load((world.base / "tokenizer_config.json").read_text()).get("chat_template")
    (lora / "chat_template.jinja").write_text(same or (world.base / "chat_template.jinja").read_text())
    plain = mole(*arguments)
    assert plain.err == f"{CHAT}\n"
    (lora / "chat_template.jinja").unlink()
    (lora / "tokenizer_config.json").write_text(json.dumps({"chat_template": OTHER}))
    noticed = mole(*arguments)
    what = "its folder has a chat template that is not the one in use"
    assert noticed.err == f"{CHAT}\nown: {what}. To use it, write --template-file {lora}\n"
    assert texts(noticed) == texts(plain)
    used = mole(*arguments, "--template-file", str(lora))
    assert used.err == f"prompts: the chat template of {lora}\n"
    file = tmp_path / "t.jinja"
    file.write_text(OTHER)
    assert texts(mole(*arguments, "--template-file", str(file), "--quiet")) == texts(used)
    loud = mole(*arguments, "--template-file", str(file), "--template-arg", "loud=true")
    assert f"prompts: the chat template of {file}, loud=true\n" in loud.err
    assert texts(loud) != texts(used)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--template-arg", "loud=true"),
            "--template-arg loud: the chat template of BASE has no such variable. Leave it out: it has none.",
        ),
        (
            ("--template-arg", "loud"),
            "--template-arg loud: not of the form KEY=VALUE. Write for example --template-arg thinking=false.",
        ),
        (
            ("--template-arg", "loud=[1]"),
            "base.template_args.loud: [1] is not text, a number, true or false. Write one such value.",
        ),
        (
            ("--set", "base.template_args=3"),
            "base.template_args: 3 is not a mapping of names to values. Write `name: value` lines.",
        ),
        (("--template-file", "none.jinja"), "--template-file none.jinja: no such file or folder. Check the path."),
        (
            ("--template-file", "LORA"),
            "--template-file LORA: it has no chat template. Name a .jinja file, or a folder with chat_template.jinja.",
        ),
        (
            ("--template-file", "LORA", "--no-chat-template"),
            "--template-file: --no-chat-template leaves it out. Write one of them.",
        ),
        (
            ("--target-language", "fr"),
            "--target-language: the tokenizer of BASE knows no languages. Leave it out.",
        ),
        (
            ("--no-chat-template", "--system-prompt", "x"),
            "--system-prompt: it is for chat templates, and --no-chat-template leaves it out. Leave it out.",
        ),
    ],
)
def test_what_a_base_does_not_take_is_refused(mole: Mole, world: World, more: tuple[str, ...], message: str) -> None:
    names = {"BASE": str(world.base), "LORA": str(world.loras["a"])}
    ran = mole("sample", "--base", world.base, *PROMPTS, *(names.get(one, one) for one in more))
    for short, long in names.items():
        message = message.replace(short, long)
    assert (ran.code, ran.out, ran.err) == (2, "", f"mole: {message}\n")


def test_a_dry_run_refuses_as_the_run_would(mole: Mole, world: World, tmp_path: Path) -> None:
    ran = mole(*compose(world, tmp_path / "run", "--dry-run", "--template-arg", "loud=true"))
    assert (ran.code, ran.err.startswith("mole: --template-arg loud: the chat template of")) == (2, True)
    assert mole(*compose(world, tmp_path / "run", "--dry-run", "--system-prompt", "Be brief.")).code == 0


def test_values_of_a_templates_variables_are_read_as_yaml(mole: Mole, world: World, tmp_path: Path) -> None:
    file, out = tmp_path / "t.jinja", tmp_path / "run"
    file.write_text(OTHER + "{{ a }}{{ b }}{{ c }}{{ d }}")
    given = ("loud=false", "a=3", "b=0.5", "c=2025-01-02", "d=low effort")
    flags = [part for text in given for part in ("--template-arg", text)]
    assert mole(*compose(world, out, "--template-file", str(file), *flags)).code == 0
    args = {"loud": False, "a": 3, "b": 0.5, "c": "2025-01-02", "d": "low effort"}
    assert yaml.safe_load((out / "recipe.yaml").read_text())["base"]["template_args"] == args
    assert load_composition(out).settings["prompts"]["template_args"] == args
    again = mole("compose", out / "recipe.yaml", "--template-arg", "a=4", "--output", tmp_path / "again")
    assert again.code == 0, again.err
    kept = yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text())["base"]["template_args"]
    assert kept == {**args, "a": 4}


@pytest.mark.parametrize(
    ("key", "value"),
    [("chat_template", False), ("system_prompt", "x"), ("template_args", {"x": 1}), ("target_language", "fr")],
)
def test_a_pipeline_takes_none_of_them(pipeline_folder: Callable[..., Path], key: str, value: Any) -> None:
    with pytest.raises(UsageError, match="it is only for language models, and the base is a diffusion pipeline"):
        load_backbone(BaseConfig(id=str(pipeline_folder("sd")), **{key: value}), "cpu")
