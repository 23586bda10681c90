"""What LRU and S4D share as language models: causality, cache, generation, saving."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_compressm.models import LRUConfig, LRUForCausalLM
from tests.models.tiny import LANGUAGE_MODELS, VOCABULARY, Tiny, name_of, sequences

each_model = pytest.mark.parametrize("tiny", LANGUAGE_MODELS, ids=name_of)


@each_model
@torch.no_grad()
def test_no_step_sees_a_later_one(tiny: Tiny) -> None:
    model = tiny.build()
    tokens = sequences("input_ids", 3, 30)["input_ids"]
    logits = model(tokens).logits
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % VOCABULARY
    torch.testing.assert_close(model(changed).logits[:, :20], logits[:, :20])
    assert not torch.allclose(model(changed).logits[:, 20:], logits[:, 20:], atol=1e-3)


@each_model
@pytest.mark.parametrize("pieces", [(30,), (1,) * 30, (7, 1, 12, 10)], ids=["whole", "single-steps", "pieces"])
@torch.no_grad()
def test_reading_in_pieces_with_a_cache_changes_nothing(tiny: Tiny, pieces: tuple[int, ...]) -> None:
    model = tiny.build(state_size=[8, 5])
    tokens = sequences("input_ids", 3, 30)["input_ids"]
    logits = model(tokens, use_cache=False).logits
    cache, found = None, []
    for piece in tokens.split(list(pieces), dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), logits, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 30


@each_model
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_and_without_cache_agree(tiny: Tiny, beams: int) -> None:
    model = tiny.build()
    tokens = sequences("input_ids", 3, 9)["input_ids"]
    settings = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False}
    cached = model.generate(tokens, **settings)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **settings))
    assert cached.shape == (3, 21)


@each_model
def test_a_shorter_prompt_padded_on_the_left_generates_the_same(tiny: Tiny) -> None:
    model = tiny.build()
    tokens = sequences("input_ids", 2, 9)["input_ids"]
    settings = {"max_new_tokens": 12, "do_sample": False}
    alone = model.generate(tokens, **settings)
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(2, 4), torch.ones(2, 9)], 1).long()
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 4:], alone)


@each_model
def test_generation_goes_on_from_a_cache(tiny: Tiny) -> None:
    model = tiny.build()
    tokens = sequences("input_ids", 2, 9)["input_ids"]
    whole = model.generate(tokens, max_new_tokens=8, do_sample=False)
    first = model.generate(tokens, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    again = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, whole)


@each_model
def test_a_cache_follows_its_sequences(tiny: Tiny) -> None:
    model = tiny.build()
    cache = model(sequences("input_ids", 3, 9)["input_ids"]).past_key_values
    before = [state.clone() for state in cache.states]
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.states[1], before[1].repeat_interleave(2, 0))
    cache.reorder_cache(torch.tensor([5, 0]))
    assert torch.equal(cache.states[0], before[0][[2, 0]])
    with pytest.raises(NotImplementedError, match="Start anew"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.states == [None, None]


@each_model
def test_loss_is_that_of_the_next_token(tiny: Tiny) -> None:
    model = tiny.build()
    tokens = sequences("input_ids", 3, 9)["input_ids"]
    output = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(model(tokens, logits_to_keep=1).logits, output.logits[:, -1:])


@each_model
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_saved_model_loads_with_the_auto_class(tiny: Tiny, tied: bool, tmp_path) -> None:
    model = tiny.build(state_size=[7, 3], tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = sequences("input_ids", 3, 9)["input_ids"]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.state_size == [7, 3]
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


@each_model
@torch.no_grad()
def test_half_precision_keeps_the_poles_in_float32(tiny: Tiny, tmp_path) -> None:
    model = tiny.build()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.lm_head.weight.dtype == torch.bfloat16
    for name, parameter in half.named_parameters():
        if name.endswith(("nu_log", "theta_log", "gamma_log", "log_dt", "A_real_log", "A_imag")):
            assert parameter.dtype == torch.float32, name
    tokens = sequences("input_ids", 3, 40)["input_ids"]
    logits = model(tokens).logits
    assert (half(tokens).logits - logits).abs().max() < 0.05 * logits.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(tokens).logits - logits).abs().max() < 0.05 * logits.abs().max()


def test_a_list_of_sizes_has_one_for_each_layer() -> None:
    with pytest.raises(ValueError, match="has 3 numbers and `num_hidden_layers` is 2"):
        LRUConfig(state_size=[1, 2, 3], num_hidden_layers=2)
    with pytest.raises(ValueError, match="reads tokens"):
        LRUForCausalLM(LRUConfig(input_size=1))
