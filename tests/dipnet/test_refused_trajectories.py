"""What cannot be run with several trajectories is refused, with the reason and what to do."""

from __future__ import annotations

import pytest
import transformers as tf

from dip_hf import NoiseKey
from tests.dipnet.models import FAMILIES, VOCABULARY, adapt, batch, build, config


KEY = NoiseKey(5, step=2)


def test_what_has_no_rows_to_repeat_is_refused() -> None:
    gemma = tf.Gemma4TextConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "global_head_dim": 8},
        **{"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2},
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    bloom = tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2)
    for model, reason in (
        (tf.Gemma4ForCausalLM(gemma), "shared_kv_states, which the blocks below have filled; .*noise_blocks='all'"),
        (tf.BloomForCausalLM(bloom), "alibi, with rows for each head; set num_trajectories"),
    ):
        adapted = adapt(model, target_modules=[], noise_blocks=1)
        with (
            pytest.raises(ValueError, match=f"num_trajectories=2: .* a block that takes {reason}"),
            adapted.base_model.sampling(KEY, 2),
        ):
            adapted(**batch())


def test_the_experts_balance_loss_is_refused() -> None:
    model = adapt(build("mixtral", output_router_logits=True), noise_blocks=2)
    with model.base_model.sampling(KEY):
        assert model(**batch(padded=True)).aux_loss.isfinite()
    with (
        pytest.raises(ValueError, match=r"output_router_logits=True with trajectories=2.*output_router_logits=False"),
        model.base_model.sampling(KEY, 2),
    ):
        pass


def test_an_output_with_the_inputs_rows_is_refused() -> None:
    config = tf.GPTBigCodeConfig(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = adapt(tf.GPTBigCodeForCausalLM(config), target_modules=[], noise_blocks=1)
    with model.base_model.sampling(KEY):
        assert model(**batch()).logits.isfinite().all()
    with pytest.raises(ValueError, match="trajectories=2: GPT-BigCode"), model.base_model.sampling(KEY, 2):
        pass


def test_masks_that_cannot_be_repeated_are_refused() -> None:
    model = adapt(build(), noise_blocks=2)
    model.get_base_model().config._attn_implementation = "flex_attention"
    message = r"trajectories=2 with attn_implementation='flex_attention'.*use 'sdpa'"
    with pytest.raises(ValueError, match=message), model.base_model.sampling(KEY, 2):
        pass


def test_states_in_a_list_are_refused() -> None:
    """RWKV's blocks fill a list that all of them share, with a row for each of the batch."""
    config = tf.RwkvConfig(vocab_size=VOCABULARY, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2)
    model = adapt(tf.RwkvForCausalLM(config).eval(), target_modules=[], noise_blocks=1)
    with pytest.raises(ValueError, match=r"num_trajectories=2: .* takes state, "), model.base_model.sampling(KEY, 2):
        model(**batch())


def test_an_adapter_that_noises_an_earlier_block_than_folds_is_refused() -> None:
    model = adapt(build(), noise_blocks=[2])
    model.add_adapter("earlier", config(noise_blocks=[1]))
    model.add_adapter("renumbered", config(noise_blocks=[1], block_names=["model.layers.1", "model.layers.2"]))
    message = r"trajectories=3: noise of '{}' sees 30 tokens of 0; .*same block_names"
    with model.base_model.sampling(KEY, 3):
        model.set_adapter("earlier")
        with pytest.raises(ValueError, match=message.format("earlier")):
            model(**batch())
    model.set_adapter("renumbered")
    with model.base_model.sampling(KEY, 3), pytest.raises(ValueError, match=message.format("renumbered")):
        model(**batch())


def test_a_head_that_picks_a_token_for_each_given_row_is_refused() -> None:
    """It would give the first trajectory's rows for the first of all."""
    config = FAMILIES["llama"]()
    config.num_labels = 3
    model = adapt(tf.LlamaForSequenceClassification(config), task_type="SEQ_CLS", noise_blocks=2)
    with model.base_model.sampling(KEY):
        assert model(**batch()).logits.shape == (3, 3)
    message = r"trajectories=2: LlamaForSequenceClassification picks .*one trajectory at a time"
    with pytest.raises(ValueError, match=message), model.base_model.sampling(KEY, 2):
        pass


def test_blocks_that_training_leaves_out_are_refused() -> None:
    base = build("opt")
    base.config.layerdrop = 0.5
    model = adapt(base, noise_blocks=2)
    with model.base_model.sampling(KEY, 2):
        assert model.eval()(**batch()).logits.shape[0] == 6
    model.train()
    with (
        pytest.raises(ValueError, match=r"trajectories=2 with layerdrop=0.5: .*layerdrop to 0.0"),
        model.base_model.sampling(KEY, 2),
    ):
        pass


def test_invocation_tokens_are_refused() -> None:
    model = adapt(build(), noise_blocks=2, alora_invocation_tokens=[7])
    with (
        pytest.raises(ValueError, match=r"trajectories=2 with alora_invocation_tokens.*leave .* unset, or set"),
        model.base_model.sampling(KEY, 2),
    ):
        pass
