"""Streams: what the tokens of a pass are, as read from the model's own calls, and what the gates make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molecli.config import GateConfig
from molecli.errors import RunError
from molecli.mixture.attach import attach
from molecli.mixture.build import build_mixture
from molecli.mixture.language_layout import TextStreams
from molecli.mixture.streams import Pass
from molecli.protocols import Group, Site

IDS = torch.tensor([[7, 8, 9, 10, 11], [0, 0, 12, 13, 14]])
LEFT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
UNSCORED = -100


class Record:
    """The passes of a model in the order they begin, along one axis."""

    def __init__(self, model: nn.Module, *, seq2seq: bool = False, axis: str = "decoder") -> None:
        self.passes: list[Pass] = []
        self.begun = 0
        self.streams = TextStreams(model, seq2seq=seq2seq)
        self.axis, self.model = axis, model

    def __enter__(self) -> Record:
        def begin() -> None:
            self.begun += 1

        self.handles = self.streams.attach(begin)
        read = self.model if not self.streams.seq2seq else getattr(self.model, f"get_{self.axis}")()
        note = read.register_forward_pre_hook(lambda *_: self.passes.append(getattr(self.streams, self.axis)))
        self.handles.append(note)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def run(model: nn.Module, **inputs: Any) -> Any:
    return model(**inputs)


# -- causal ------------------------------------------------------------------------------------------------------------


def test_without_labels_every_valid_token_is_prompt(tiny_llama: Any) -> None:
    with Record(tiny_llama.model) as record:
        run(tiny_llama.model, input_ids=IDS, attention_mask=LEFT)
    (seen,) = record.passes
    assert torch.equal(seen.valid, LEFT)
    assert torch.equal(seen.prompt, LEFT)
    assert (seen.past, seen.memory) == (0, None)


def test_without_a_mask_every_token_is_valid(tiny_llama: Any) -> None:
    with Record(tiny_llama.model) as record:
        run(tiny_llama.model, input_ids=IDS)
        run(tiny_llama.model, inputs_embeds=torch.zeros(2, 3, 32))
    assert [seen.valid.tolist() for seen in record.passes] == [[[1] * 5] * 2, [[1] * 3] * 2]


def test_the_first_argument_may_come_without_its_name(tiny_llama: Any) -> None:
    with Record(tiny_llama.model) as record, torch.no_grad():
        tiny_llama.model(IDS, attention_mask=LEFT)
    assert torch.equal(record.passes[0].valid, LEFT)


def test_with_labels_the_prompt_ends_before_the_first_scored_token(tiny_llama: Any) -> None:
    labels = IDS.clone()
    labels[0, :2] = labels[1, :4] = UNSCORED
    with Record(tiny_llama.model) as record:
        run(tiny_llama.model, input_ids=IDS, attention_mask=LEFT, labels=labels)
    assert record.passes[0].prompt.tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]
    assert torch.equal(record.passes[0].valid, LEFT)


def test_unscored_tokens_behind_the_answer_are_no_prompt(tiny_llama: Any) -> None:
    labels = torch.tensor([[UNSCORED, UNSCORED, 9, 10, UNSCORED], [UNSCORED, UNSCORED, UNSCORED, 13, UNSCORED]])
    with Record(tiny_llama.model) as record:
        run(tiny_llama.model, input_ids=IDS, attention_mask=LEFT, labels=labels)
    assert record.passes[0].prompt.tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_reads_the_prompt_once_and_then_one_token_at_a_time(
    kind: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"tiny_{kind}").model
    with Record(model) as record:
        model.generate(input_ids=IDS, attention_mask=LEFT, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert [seen.past for seen in record.passes] == [0, 5, 6]
    assert [seen.step for seen in record.passes] == [1, 2, 3]
    assert record.begun == 3
    assert torch.equal(record.passes[0].valid, LEFT)
    # The mask has grown to the whole sequence; what is valid are the tokens of this pass.
    assert all(torch.equal(seen.valid, torch.ones(2, 1, dtype=torch.long)) for seen in record.passes[1:])


def test_generation_without_a_cache_reads_the_whole_each_time(tiny_llama: Any) -> None:
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": 0, "use_cache": False}
    with Record(tiny_llama.model) as record:
        tiny_llama.model.generate(input_ids=IDS, attention_mask=LEFT, **options)
    assert [(seen.past, seen.valid.shape[1]) for seen in record.passes] == [(0, 5), (0, 6), (0, 7)]


def test_hooks_come_off(tiny_llama: Any) -> None:
    with Record(tiny_llama.model) as record:
        pass
    run(tiny_llama.model, input_ids=IDS)
    assert (record.passes, record.begun) == ([], 0)


# -- seq2seq -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_decoder_knows_the_encoders_output_and_its_padding(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(f"tiny_{kind}").model
    right = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with Record(model, seq2seq=True) as decoder, Record(model, seq2seq=True, axis="encoder") as encoder:
        out = run(model, input_ids=IDS, attention_mask=right, labels=IDS[:, :3].clone())
    assert torch.equal(encoder.passes[0].valid, right)
    assert torch.equal(encoder.passes[0].prompt, right)
    (seen,) = decoder.passes
    assert torch.equal(seen.memory, out.encoder_last_hidden_state)
    assert torch.equal(seen.memory_valid, right)
    assert seen.valid.tolist() == [[1, 1, 1]] * 2
    assert seen.prompt.tolist() == [[1, 0, 0]] * 2  # the start token


def test_an_encoder_pass_is_shared_by_all_steps_of_a_generation(tiny_t5: Any) -> None:
    model = tiny_t5.model
    with Record(model, seq2seq=True) as decoder, Record(model, seq2seq=True, axis="encoder") as encoder:
        model.generate(input_ids=IDS, attention_mask=LEFT, max_new_tokens=3, min_new_tokens=3)
    assert len(encoder.passes) == 1
    assert [seen.past for seen in decoder.passes] == [0, 1, 2]
    assert all(torch.equal(seen.memory_valid, LEFT) for seen in decoder.passes)


def test_memory_without_a_mask_is_valid_throughout(tiny_t5: Any) -> None:
    with Record(tiny_t5.model, seq2seq=True) as record:
        tiny_t5.model.get_decoder()(input_ids=IDS[:, :2], encoder_hidden_states=torch.zeros(2, 4, 32))
    assert record.passes[0].memory_valid.tolist() == [[1.0] * 4] * 2


def test_the_stream_of_cross_attention_is_the_decoders_pass(tiny_t5: Any) -> None:
    streams = TextStreams(tiny_t5.model, seq2seq=True)

    def of(stream: Any) -> Pass:
        return streams.of(Site("s", (Group(("m",), stream),)))

    assert of("memory") is of("decoder") is streams.decoder
    assert of("encoder") is streams.encoder


# -- what the gates make of it -----------------------------------------------------------------------------------------


@pytest.fixture
def loras(tiny_llama: Any, make_peft_adapter: Callable[..., Path], tmp_path: Path) -> dict[str, str]:
    return {
        name: str(make_peft_adapter(tiny_llama.model, tmp_path / name, seed=seed, scale=0.2))
        for seed, name in enumerate("ab")
    }


@pytest.fixture
def mixture(tiny_llama: Any, loras: dict[str, str]) -> Any:
    """Gates that the prompt decides, far from uniform."""
    made = attach(tiny_llama.model, loras=loras, mode="gated", gate=GateConfig(granularity="block", pool="prompt"))
    torch.manual_seed(0)
    for parameter in made.named_parameters().values():
        parameter.data += 3 * torch.randn(parameter.shape)
    base = run(tiny_llama.model, input_ids=IDS).logits
    with made:
        # Gates that are computed and weigh nothing would pass the tests below.
        assert not torch.allclose(run(tiny_llama.model, input_ids=IDS).logits, base, atol=0.1)
    return made


def gates(mixture: Any) -> Tensor:
    return torch.stack(list(mixture.gates().values()))


def test_a_prompts_gate_is_decided_at_prefill_and_then_fixed(tiny_llama: Any, mixture: Any) -> None:
    model, seen = tiny_llama.model, []
    with mixture:
        handle = model.register_forward_hook(lambda *_: seen.append(gates(mixture)))
        model.generate(input_ids=IDS, attention_mask=LEFT, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
        handle.remove()
    assert len(seen) == 4
    assert all(torch.equal(values, seen[0]) for values in seen)
    assert not torch.allclose(seen[0][:, 0], seen[0][:, 1], atol=1e-3)  # two prompts, two gates


def test_a_prompts_gate_in_training_is_that_of_generation(tiny_llama: Any, mixture: Any) -> None:
    model = tiny_llama.model
    answered = torch.cat([IDS[:1], torch.tensor([[30, 31]])], 1)
    labels = answered.clone()
    labels[:, :5] = UNSCORED
    with mixture:
        run(model, input_ids=IDS[:1])
        prompt_alone = gates(mixture)
        run(model, input_ids=answered, labels=labels)
        taught = gates(mixture)
        run(model, input_ids=answered)
        all_prompt = gates(mixture)
    torch.testing.assert_close(taught, prompt_alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(all_prompt, prompt_alone, atol=1e-3)


def test_left_padding_does_not_reach_a_gate(tiny_llama: Any, mixture: Any) -> None:
    with mixture:
        run(tiny_llama.model, input_ids=IDS, attention_mask=LEFT)
        padded = gates(mixture)[:, 1]
        run(tiny_llama.model, input_ids=IDS[1:, 2:])
        alone = gates(mixture)[:, 0]
        run(tiny_llama.model, input_ids=IDS)
        unmasked = gates(mixture)[:, 1]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unmasked, alone, atol=1e-3)


@pytest.mark.parametrize("switch", ["attach", "mask"])
def test_a_cache_from_before_the_experts_were_switched_is_refused(switch: str, tiny_llama: Any, mixture: Any) -> None:
    model = tiny_llama.model
    message = (
        "generation: the cache has tokens from before the experts were attached or masked. Start with an empty cache."
    )
    if switch == "attach":
        cache = run(model, input_ids=IDS, use_cache=True).past_key_values
    with mixture:
        if switch == "mask":
            cache = run(model, input_ids=IDS, use_cache=True).past_key_values
            run(model, input_ids=IDS[:, :1], past_key_values=cache)
            mixture.mask("b")
        with pytest.raises(RunError) as caught:
            run(model, input_ids=IDS[:, :1], past_key_values=cache)
    assert (str(caught.value), caught.value.exit_code) == (message, 1)


@pytest.mark.parametrize("pool", ["prompt", "running"])
def test_a_generation_goes_on_from_its_own_prompt_alone(pool: str, tiny_llama: Any, loras: dict[str, str]) -> None:
    model = tiny_llama.model
    with attach(model, loras=loras, mode="gated", gate=GateConfig(pool=pool)):
        first = run(model, input_ids=IDS, use_cache=True).past_key_values
        run(model, input_ids=IDS[:, :1], past_key_values=first)
        second = run(model, input_ids=IDS[:, :2], use_cache=True).past_key_values
        with pytest.raises(RunError) as caught:
            run(model, input_ids=IDS[:, :1], past_key_values=first)
        assert str(caught.value) == (
            "generation: the cache is not that of the last prompt, for which the gates were computed. "
            "Start with an empty cache."
        )
        run(model, input_ids=IDS[:, :1], past_key_values=second)
    with attach(model, loras=loras, mode="gated", gate=GateConfig(pool="token")):
        run(model, input_ids=IDS, use_cache=True)
        run(model, input_ids=IDS[:, :1], past_key_values=first)  # a token's own gate remembers nothing


def test_experts_called_outside_their_model_are_refused(tiny_llama: Any, mixture: Any) -> None:
    with mixture, pytest.raises(RunError) as caught:
        tiny_llama.model.model.layers[0].self_attn.q_proj(torch.zeros(1, 2, 32))
    assert str(caught.value) == (
        "mixture: the experts were called outside the model they are attached to. Call the model itself."
    )


def test_a_constant_gate_does_not_mind_a_cache_from_before(tiny_llama: Any, loras: dict[str, str]) -> None:
    model = tiny_llama.model
    cache = run(model, input_ids=IDS, use_cache=True).past_key_values
    base = run(model, input_ids=IDS[:, :1], past_key_values=cache).logits
    with attach(model, loras=loras):
        cache = run(model, input_ids=IDS, use_cache=True).past_key_values
        assert not torch.allclose(run(model, input_ids=IDS[:, :1], past_key_values=cache).logits, base, atol=1e-2)


def test_a_second_mixture_of_one_bank_starts_without_the_firsts_gates(tiny_llama: Any, mixture: Any) -> None:
    with mixture:
        run(tiny_llama.model, input_ids=IDS)
    assert mixture.gates()
    fresh = build_mixture(tiny_llama.model, mixture.bank.experts, mode="gated")
    assert fresh.gates() == {}
