from __future__ import annotations

import pytest
import torch
from torch import nn

from molecli.bases.seq2seq import Seq2Seq
from molecli.errors import UsageError
from molecli.protocols import Example

PROMPTS = ["hello you", "What is this thing? now", "a"]
EXAMPLES = [Example("echo", "copy: one", "one"), Example("echo", "copy: a longer one, héllo", "héllo")]


@pytest.fixture(params=["t5", "bart"])
def backbone(request, make_tiny) -> Seq2Seq:
    return Seq2Seq(*make_tiny(request.param), request.param)


def test_the_base_is_frozen_and_in_eval_mode(backbone):
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_every_linear_layer_but_the_head_is_adaptable(backbone):
    modules = dict(backbone.model.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    assert set(backbone.matrices()) == linear - {"lm_head"}
    assert all(modules[name].weight.shape == shape for name, shape in backbone.matrices().items())


def test_targets_end_in_eos_and_padding_is_not_scored(backbone):
    batch = backbone.collate(EXAMPLES)
    for row, example in zip(batch["labels"].tolist(), EXAMPLES, strict=True):
        scored = [token for token in row if token != -100]
        assert scored[-1] == backbone.tokenizer.eos_token_id
        assert backbone.tokenizer.decode(scored, skip_special_tokens=True) == example.target
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()


def test_prompts_are_encoded_in_training_as_in_generation(backbone):
    seen = []
    backbone.model.get_encoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"] if not args else args[0]), with_kwargs=True
    )
    backbone.token_loss(backbone.collate(EXAMPLES))
    backbone.generate([example.prompt for example in EXAMPLES], max_new_tokens=1)
    assert torch.equal(seen[0], seen[1])


def test_token_loss_is_the_models_own_loss_times_the_number_of_tokens(backbone):
    batch = backbone.collate(EXAMPLES)
    total, count = backbone.token_loss(batch)
    assert count == (batch["labels"] != -100).sum()
    assert torch.allclose(total / count, backbone.model(**batch).loss, rtol=1e-5)


def test_the_loss_of_a_batch_is_the_sum_over_its_examples(backbone):
    together, _ = backbone.token_loss(backbone.collate(EXAMPLES))
    apart = sum(backbone.token_loss(backbone.collate([example]))[0] for example in EXAMPLES)
    assert torch.allclose(together, apart, rtol=1e-5)


def test_each_examples_loss_is_the_mean_over_its_own_tokens(backbone):
    each = backbone.example_losses(backbone.collate(EXAMPLES))
    alone = [backbone.token_loss(backbone.collate([example])) for example in EXAMPLES]
    assert torch.allclose(each, torch.stack([total / count for total, count in alone]), rtol=1e-5)
    total, count = backbone.example_loss(backbone.collate(EXAMPLES))
    assert (total, count) == (each.sum(), len(EXAMPLES))


def test_whoever_watches_the_decoder_is_told_what_is_padding(backbone):
    seen = []
    decoder = backbone.model.get_decoder()
    handle = decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    batch = backbone.collate(EXAMPLES)
    backbone.token_loss(batch)
    handle.remove()
    assert torch.equal(seen[0]["attention_mask"], (batch["labels"] != -100).long())
    assert not seen[0]["attention_mask"].all()


def test_cached_generation_equals_uncached(backbone):
    cached = backbone.generate(PROMPTS, max_new_tokens=12)
    assert cached == backbone.generate(PROMPTS, max_new_tokens=12, use_cache=False)
    assert len(set(cached)) == len(PROMPTS)


def test_a_padded_batch_generates_as_one_by_one(backbone):
    alone = [backbone.generate([prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert backbone.generate(PROMPTS, max_new_tokens=12) == alone


def test_sampling_repeats_by_seed_and_leaves_the_global_generator_alone(backbone):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = backbone.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert first == backbone.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=1)
    assert first != backbone.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=2)


def test_a_checkpoints_own_decoding_settings_change_nothing(backbone):
    plain = backbone.generate(PROMPTS, max_new_tokens=8)
    sampled = backbone.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=1)
    hub = {"num_beams": 4, "no_repeat_ngram_size": 1, "repetition_penalty": 3.0, "min_length": 5, "top_k": 1}
    for name, value in hub.items():
        setattr(backbone.model.generation_config, name, value)
    assert backbone.generate(PROMPTS, max_new_tokens=8) == plain
    assert backbone.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=1) == sampled


def test_no_prompts_give_no_completions_and_an_empty_prompt_gives_one(backbone):
    assert backbone.generate([], max_new_tokens=4) == []
    assert len(backbone.generate([""], max_new_tokens=4)) == 1


def test_text_beyond_the_positions_of_the_base_is_refused(make_tiny):
    backbone = Seq2Seq(*make_tiny("bart"))
    with pytest.raises(UsageError) as error:
        backbone.generate(["short", "x" * 600], max_new_tokens=4)
    assert str(error.value) == "prompt 2: 602 tokens do not fit in this base's limit of 512. Shorten it."
    with pytest.raises(UsageError) as error:
        backbone.collate([Example("long_task", "x", "y" * 600)])
    assert str(error.value) == "an example of long_task: 602 tokens do not fit in this base's limit of 512. Shorten it."


def test_relative_positions_have_no_limit(make_tiny):
    assert len(Seq2Seq(*make_tiny("t5")).generate(["x" * 600], max_new_tokens=2)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens: 0 is less than 1. Write 1 or more."),
        (
            {"max_new_tokens": 1, "temperature": -1.0},
            "--temperature: -1.0 is not a temperature. Write 0 (greedy) or more.",
        ),
        ({"max_new_tokens": 1, "top_p": 0.0}, "--top-p: 0.0 is not in (0, 1]. Write 1 to keep every token."),
    ],
)
def test_impossible_decoding_settings_are_usage_errors(make_tiny, options, message):
    with pytest.raises(UsageError) as error:
        Seq2Seq(*make_tiny("t5")).generate(["x"], **options)
    assert str(error.value) == message
