"""Language codes: labels as the library's own training makes them, and generation that begins with the target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from molecli.bases.causal import Causal
from molecli.bases.languages import language_codes
from molecli.bases.loading import load_backbone
from molecli.bases.prompt_record import record_of
from molecli.bases.seq2seq import Seq2Seq
from molecli.config import BaseConfig
from molecli.errors import UsageError
from molecli.protocols import Example

WORDS = ["▁" + word for word in ["the", "old", "fox", "runs", "le", "vieux", "renard", "court"]]
SIZES = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
MBART = ("MBartForConditionalGeneration", "MBartConfig")
M2M = ("M2M100ForConditionalGeneration", "M2M100Config")
# name -> (tokenizer, model, source, target)
KINDS = {
    "mbart": ("MBartTokenizer", MBART, "en_XX", "fr_XX"),
    "mbart-50": ("MBart50Tokenizer", MBART, "en_XX", "fr_XX"),
    "nllb": ("NllbTokenizer", M2M, "eng_Latn", "fra_Latn"),
}
EXAMPLES = [Example("t", "the old fox", "le vieux renard"), Example("t", "runs", "court le renard")]


def make(kind: str, **settings: Any) -> tuple[Any, Any]:
    """A tiny model and a tokenizer of that class, over a few words."""
    name, (model, config), *_ = KINDS[kind]
    if kind == "nllb":  # a BPE: its words are single letters here
        letters = sorted(set("".join(WORDS)))
        pieces: Any = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}
    else:
        pieces = [(piece, -1.0) for piece in ["<s>", "<pad>", "</s>", "<unk>", *WORDS]]
    tokenizer = getattr(transformers, name)(vocab=pieces, **settings)
    ids = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 2}
    torch.manual_seed(0)
    return getattr(transformers, model)(
        getattr(transformers, config)(vocab_size=len(tokenizer) + 1, **ids, **SIZES)
    ).eval(), tokenizer


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def backbone(kind: str) -> Seq2Seq:
    _, _, source, target = KINDS[kind]
    return Seq2Seq(*make(kind), kind, source_language=source, target_language=target)


def shown_to(module: Any, names: tuple[str, ...], call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The keywords that `module` receives while `call` runs."""
    seen: list[dict[str, Any]] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append({name: kwargs.get(name) for name in names}), with_kwargs=True
    )
    call()
    hook.remove()
    return seen


def scored(labels: torch.Tensor) -> list[list[int]]:
    return [[token for token in row if token != -100] for row in labels.tolist()]


def test_labels_are_those_of_the_librarys_own_training(backbone: Seq2Seq) -> None:
    batch = backbone.collate(EXAMPLES)
    for row, example in zip(scored(batch["labels"]), EXAMPLES, strict=True):
        own = backbone.tokenizer(example.prompt, text_target=example.target)
        assert row == own["labels"]
        assert example.prompt in backbone.tokenizer.decode(own["input_ids"])
    prompts = [
        [t for t, m in zip(*row, strict=True) if m]
        for row in zip(*map(torch.Tensor.tolist, (batch["input_ids"], batch["attention_mask"])), strict=True)
    ]
    assert prompts == [backbone.tokenizer(example.prompt)["input_ids"] for example in EXAMPLES]


def test_decoder_inputs_are_those_of_the_librarys_own_training(backbone: Seq2Seq) -> None:
    batch = backbone.collate(EXAMPLES)
    seen = shown_to(backbone.model.get_decoder(), ("input_ids",), lambda: backbone.token_loss(batch))[0]["input_ids"]
    padded = {k: batch[k] for k in ("input_ids", "attention_mask")} | {"labels": batch["labels"].clone()}
    own = shown_to(backbone.model.get_decoder(), ("input_ids",), lambda: backbone.model(**padded))[0]["input_ids"]
    counted = batch["labels"] != -100
    assert torch.equal(seen[counted], own[counted])


def test_generation_begins_as_the_labels_do(backbone: Seq2Seq, kind: str) -> None:
    target = language_codes(backbone.tokenizer)[KINDS[kind][3]]
    decoder = backbone.model.get_decoder()
    steps = shown_to(decoder, ("input_ids",), lambda: backbone.generate(["the old fox", "runs"], max_new_tokens=3))
    batch = backbone.collate(EXAMPLES)
    forced = shown_to(decoder, ("input_ids",), lambda: backbone.token_loss(batch))[0]["input_ids"]
    width = 1 if kind == "mbart" else 2
    said = torch.cat([step["input_ids"] for step in steps], dim=1)[:, :width]
    assert torch.equal(said, forced[:, :width])
    assert (said[:, -1] == target).all()


def test_a_completions_loss_is_what_its_greedy_tokens_cost(backbone: Seq2Seq, kind: str) -> None:
    out: list[torch.Tensor] = []
    generate = backbone.model.generate
    backbone.model.generate = lambda **how: out.append(generate(**how)) or out[0]  # type: ignore[operator]
    text = backbone.generate(["the old fox"], max_new_tokens=4)[0]
    assert not any(code in text for code in language_codes(backbone.tokenizer))
    said = out[0][:, : out[0].shape[1]]
    logits = backbone.model(**backbone.tokenizer("the old fox", return_tensors="pt"), decoder_input_ids=said).logits
    free = 0 if kind == "mbart" else 1  # the forced token is not the model's choice
    assert torch.equal(logits[0, free:-1].argmax(-1), said[0, free + 1 :])


def test_the_tokenizers_own_languages_are_the_default(kind: str, tmp_path: Any) -> None:
    _, _, source, target = KINDS[kind]
    model, tokenizer = make(kind, src_lang=source, tgt_lang=target)
    found = Seq2Seq(model, tokenizer, kind).languages
    assert (found.source, found.target) == (source, target)
    other = Seq2Seq(*make(kind), kind, source_language=target, target_language=source)
    assert found != other.languages
    assert scored(other.collate(EXAMPLES)["labels"]) != scored(Seq2Seq(model, tokenizer).collate(EXAMPLES)["labels"])


def test_a_model_with_one_target_names_it_in_its_generation_config(kind: str) -> None:
    model, tokenizer = make(kind)
    code = KINDS[kind][3]
    model.generation_config.forced_bos_token_id = language_codes(tokenizer)[code]
    assert Seq2Seq(model, tokenizer, kind, source_language=KINDS[kind][2]).languages.target == code


def test_a_language_that_is_needed_and_not_named_is_refused(kind: str) -> None:
    _, _, source, target = KINDS[kind]
    with pytest.raises(UsageError, match=r"its tokenizer needs a source language, .*--source-language CODE, such as "):
        Seq2Seq(*make(kind), kind, target_language=target)
    with pytest.raises(UsageError, match=r"its tokenizer needs a target language, .*--target-language CODE, such as "):
        Seq2Seq(*make(kind), kind, source_language=source)


def test_an_unknown_language_is_refused_with_the_nearest_one(kind: str) -> None:
    _, _, source, target = KINDS[kind]
    with pytest.raises(UsageError) as error:
        Seq2Seq(*make(kind), kind, source_language=source, target_language=target.lower()[:-1] + "x")
    assert "knows no such language" in str(error.value)


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_language_for_a_tokenizer_without_any_is_refused(make_tiny: Any, side: str) -> None:
    for made, kind in ((Seq2Seq, "t5"), (Seq2Seq, "bart"), (Causal, "llama")):
        with pytest.raises(UsageError) as error:
            made(*make_tiny(kind), "my-base", **{f"{side}_language": "fr"})
        assert str(error.value) == f"--{side}-language: the tokenizer of my-base knows no languages. Leave it out."


def test_a_fixed_pair_takes_only_itself(make_tiny: Any) -> None:
    model, tokenizer = make_tiny("bart")
    tokenizer.src_lang, tokenizer.tgt_lang = "en", "de"  # as FSMT's
    Seq2Seq(model, tokenizer, "wmt", source_language="en", target_language="de")
    with pytest.raises(UsageError) as error:
        Seq2Seq(model, tokenizer, "wmt", target_language="ru")
    assert str(error.value) == "--target-language: wmt translates only from en to de. Leave it out."


def test_a_tokenizer_with_two_vocabularies_writes_no_targets(make_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_tiny("bart")
    monkeypatch.setattr(type(tokenizer), "encoder", {"a": 5, "b": 6}, raising=False)
    monkeypatch.setattr(type(tokenizer), "decoder", {5: "b", 6: "a"})  # as FSMT's of two languages
    backbone = Seq2Seq(model, tokenizer, "wmt")
    with pytest.raises(UsageError, match="wmt: its tokenizer writes targets with the vocabulary of the prompts"):
        backbone.collate(EXAMPLES)
    monkeypatch.setattr(type(tokenizer), "decoder", {5: "a", 6: "b"})
    assert Seq2Seq(model, tokenizer, "wmt").collate(EXAMPLES)


@pytest.mark.parametrize("form", [">>{}<<", "<2{}>"])
def test_a_tag_in_the_prompt_names_the_target(make_tiny: Any, form: str) -> None:
    model, tokenizer = make_tiny("t5")
    tokenizer.add_tokens([form.format("fr"), form.format("de")])
    model.resize_token_embeddings(len(tokenizer))
    tag = form.format("fr")
    backbone = Seq2Seq(model, tokenizer, "multi", target_language="fr")
    written = Seq2Seq(model, tokenizer, "multi")
    prompts = [b.collate([Example("t", p, "x")])["input_ids"].tolist() for b, p in (
        (backbone, "hi"), (backbone, f"{tag} hi"), (written, f"{tag} hi"))]  # fmt: skip
    assert prompts[0] == prompts[1] == prompts[2]
    assert prompts[0][0][0] == tokenizer.convert_tokens_to_ids(tag)
    with pytest.raises(UsageError, match="needs a target language"):
        written.generate(["hi"], max_new_tokens=1)
    with pytest.raises(UsageError, match="it is fr, and a prompt begins with"):
        backbone.generate([form.format("de") + " hi"], max_new_tokens=1)
    with pytest.raises(UsageError, match="only the target has a tag"):
        Seq2Seq(model, tokenizer, "multi", source_language="fr")


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_teacher_forcing_starts_where_generation_starts(make_tiny: Any, kind: str) -> None:
    backbone = Seq2Seq(*make_tiny(kind))
    backbone.model.generation_config.decoder_start_token_id = 9
    decoder = backbone.model.get_decoder()
    batch = backbone.collate(EXAMPLES)
    forced = shown_to(decoder, ("input_ids",), lambda: backbone.token_loss(batch))[0]["input_ids"]
    said = shown_to(decoder, ("input_ids",), lambda: backbone.generate(["x"], max_new_tokens=1))[0]["input_ids"]
    assert (forced[:, 0] == 9).all()
    assert (said == 9).all()


def test_a_base_without_a_first_token_is_refused(make_tiny: Any) -> None:
    backbone = Seq2Seq(*make_tiny("t5"), "my-base")
    backbone.model.generation_config.decoder_start_token_id = None
    assert backbone.collate(EXAMPLES)  # config.json has one
    started = backbone.generate(["x"], max_new_tokens=2)
    backbone.model.generation_config.bos_token_id = 9
    assert backbone.generate(["x"], max_new_tokens=2) == started
    backbone.model.config.decoder_start_token_id = backbone.model.generation_config.bos_token_id = None
    with pytest.raises(UsageError, match="my-base: its configuration names no token that a completion starts with"):
        backbone.generate(["x"], max_new_tokens=2)


def test_a_forced_first_token_is_part_of_the_target(make_tiny: Any) -> None:
    backbone = Seq2Seq(*make_tiny("t5"))
    before = scored(backbone.collate(EXAMPLES)["labels"])
    backbone.model.generation_config.forced_bos_token_id = 7
    assert scored(backbone.collate(EXAMPLES)["labels"]) == [[7, *row] for row in before]


def test_a_saved_base_is_loaded_with_the_languages_that_are_named(kind: str, tmp_path: Path) -> None:
    _, _, source, target = KINDS[kind]
    for part in make(kind):  # the tokenizer is saved with its source language, or else with English
        part.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="needs a target language"):
        load_backbone(BaseConfig(id=str(tmp_path)), "cpu")
    base = BaseConfig(id=str(tmp_path), source_language=source, target_language=target)
    backbone: Any = load_backbone(base, "cpu")
    record = record_of(backbone)
    assert record is not None
    assert (record.source_language, record.target_language) == (source, target)
    assert record.words() == f"plain text, from {source} to {target}"
    own = backbone.tokenizer("the old fox", text_target="le renard")["labels"]
    assert scored(backbone.collate([Example("t", "the old fox", "le renard")])["labels"]) == [own]
    assert language_codes(backbone.tokenizer)[target] in own
    backbone.tokenizer.save_pretrained(tmp_path)
    again: Any = load_backbone(base.model_copy(update={"source_language": None, "target_language": target}), "cpu")
    assert again.languages.target == target
