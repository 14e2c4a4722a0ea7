from __future__ import annotations

import pytest
import torch
from torch import nn

from molecli.bases.causal import Causal
from molecli.errors import UsageError
from molecli.protocols import Example

PROMPTS = ["hello you", "What is this thing? now", "a"]
EXAMPLES = [Example("echo", "copy: one", "one"), Example("echo", "copy: a longer one, héllo\n", "héllo")]
EOS, BOS, USER, ASSISTANT, END = 1, 2, 3, 4, 5


@pytest.fixture(params=["llama", "llama-chat", "gpt2"])
def backbone(request, make_tiny) -> Causal:
    kind, _, chat = request.param.partition("-")
    return Causal(*make_tiny(kind, chat=bool(chat)), request.param)


def given(batch: dict, row: int) -> list[int]:
    """The unscored, unpadded tokens of a row: its prompt."""
    unscored = (batch["labels"][row] == -100) & (batch["attention_mask"][row] == 1)
    return batch["input_ids"][row][unscored].tolist()


def scored(batch: dict, row: int) -> list[int]:
    return [token for token in batch["labels"][row].tolist() if token != -100]


def calls(model: nn.Module) -> list[dict]:
    """The keywords of every later call of `model`."""
    seen: list[dict] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


def test_every_linear_layer_but_the_head_is_adaptable(backbone):
    modules = dict(backbone.model.named_modules())
    linear = {name for name, m in modules.items() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    assert set(backbone.matrices()) == linear - {"lm_head"}


def test_conv1d_shapes_are_given_as_d_out_d_in(make_tiny):
    assert Causal(*make_tiny("gpt2")).matrices()["transformer.h.0.attn.c_attn"] == (96, 32)


def test_the_tokens_of_the_prompt_are_the_same_in_training_and_in_generation(backbone):
    batch = backbone.collate(EXAMPLES)
    seen = calls(backbone.model)
    for row, example in enumerate(EXAMPLES):
        backbone.generate([example.prompt], max_new_tokens=1)
        assert seen[-1]["input_ids"][0].tolist() == given(batch, row)


def test_targets_are_scored_with_their_end_and_padding_is_not(backbone):
    batch = backbone.collate(EXAMPLES)
    for row, example in enumerate(EXAMPLES):
        assert scored(batch, row)[-1] == backbone.format.ending_ids[-1]
        assert scored(batch, row)[-1] in backbone.format.stop
        assert backbone.format.completion(example.prompt, scored(batch, row)) == example.target
        rest = batch["input_ids"][row][: len(given(batch, row)) + len(scored(batch, row))]
        assert rest.tolist() == given(batch, row) + scored(batch, row)


def test_without_a_template_a_space_parts_prompt_and_target_unless_one_is_there(make_tiny):
    backbone = Causal(*make_tiny("gpt2"))
    batch = backbone.collate(EXAMPLES)
    assert [backbone.tokenizer.decode(scored(batch, row)) for row in (0, 1)] == [" one</s>", "héllo</s>"]


def test_a_chat_template_wraps_the_prompt_in_one_user_turn_with_one_bos(make_tiny):
    backbone = Causal(*make_tiny("llama", chat=True))
    batch = backbone.collate(EXAMPLES[:1])
    prompt = given(batch, 0)
    assert prompt[:2] == [BOS, USER]
    assert prompt[-2:] == [END, ASSISTANT]
    assert prompt.count(BOS) == 1
    assert backbone.tokenizer.decode(scored(batch, 0)) == "one<|end|>"


def test_the_template_is_left_out_on_request(make_tiny):
    backbone = Causal(*make_tiny("llama", chat=True), chat_template=False)
    ids = backbone.format.prompt_ids("hi")
    assert ids[0] == BOS
    assert USER not in ids


def test_generation_stops_at_the_templates_end_of_turn_though_it_is_not_eos(make_tiny):
    backbone = Causal(*make_tiny("llama", chat=True))
    assert backbone.format.stop == (EOS, END)
    assert backbone.format.ending_ids == (END,)


def test_a_template_without_an_end_of_turn_gets_eos(make_tiny):
    model, tokenizer = make_tiny("llama", chat=True)
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    assert Causal(model, tokenizer).format.ending_ids == (EOS,)


def test_a_tokenizer_without_pad_token_pads_with_eos(make_tiny):
    backbone = Causal(*make_tiny("gpt2"))
    assert backbone.tokenizer.pad_token_id == EOS
    batch = backbone.collate(EXAMPLES)
    assert (batch["input_ids"][0][batch["attention_mask"][0] == 0] == EOS).all()


def test_a_tokenizer_without_eos_is_refused(make_tiny):
    model, tokenizer = make_tiny("gpt2")
    tokenizer.eos_token = None
    with pytest.raises(UsageError) as error:
        Causal(model, tokenizer, "my-base")
    assert str(error.value) == "my-base: it has no eos token, so completions would not end. Add eos_token."


def test_token_loss_is_the_models_own_loss_times_the_number_of_tokens(backbone):
    batch = backbone.collate(EXAMPLES)
    total, count = backbone.token_loss(batch)
    assert count == (batch["labels"] != -100).sum()
    assert torch.allclose(total / count, backbone.model(**batch).loss, rtol=1e-5)


def test_logits_for_scored_places_alone_give_the_loss_of_all_logits(backbone):
    batch = backbone.collate(EXAMPLES)
    sliced = backbone.token_loss(batch)
    backbone._sliced = False
    assert torch.allclose(sliced[0], backbone.token_loss(batch)[0], rtol=1e-5)
    assert sliced[1] == backbone.token_loss(batch)[1]


def test_teacher_forcing_shows_the_labels_to_whoever_watches_the_model(backbone):
    batch = backbone.collate(EXAMPLES)
    seen = calls(backbone.model)
    backbone.token_loss(batch)
    assert torch.equal(seen[-1]["labels"], batch["labels"])
    assert not seen[-1]["use_cache"]


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


def test_cached_generation_equals_uncached(backbone):
    cached = backbone.generate(PROMPTS, max_new_tokens=12)
    assert cached == backbone.generate(PROMPTS, max_new_tokens=12, use_cache=False)
    assert len(set(cached)) == len(PROMPTS)


def test_a_left_padded_batch_generates_as_one_by_one(backbone):
    alone = [backbone.generate([prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert backbone.generate(PROMPTS, max_new_tokens=12) == alone


def test_an_empty_prompt_still_has_a_token_to_start_from(backbone):
    assert backbone.format.prompt_ids("")
    assert len(backbone.generate([""], max_new_tokens=2)) == 1
    assert backbone.generate([], max_new_tokens=2) == []


def test_sampling_repeats_by_seed(backbone):
    first = backbone.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=1)
    assert first == backbone.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=1)
    assert first != backbone.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=2)


def test_text_beyond_the_positions_of_the_base_is_refused(make_tiny):
    backbone = Causal(*make_tiny("gpt2"))
    with pytest.raises(UsageError) as error:
        backbone.generate(["short", "x" * 510], max_new_tokens=4)
    assert str(error.value) == (
        "prompt 2: 510 tokens and 4 new ones do not fit in this base's limit of 512. "
        "Shorten it or lower --max-new-tokens."
    )
    with pytest.raises(UsageError) as error:
        backbone.collate([Example("long_task", "x" * 600, "y")])
    assert str(error.value) == "an example of long_task: 603 tokens do not fit in this base's limit of 512. Shorten it."
