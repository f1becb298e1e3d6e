"""Dimensions, counts and scaling rules against figures worked out by hand or published."""

from __future__ import annotations

import math

import pytest

from picotrain import shape
from picotrain.models.gpt import GPTConfig


def d4(**changes: object) -> GPTConfig:
    return GPTConfig(**({"depth": 4, "head_dim": 64} | changes))


def test_width_is_64_times_depth_rounded_up_to_whole_heads():
    assert d4().dims().width == 256
    odd = GPTConfig(depth=13, head_dim=128).dims()  # 832 = 6.5 heads
    assert (odd.width, odd.n_heads) == (896, 7)


def test_grouped_query_attention_shrinks_only_key_and_value():
    full, grouped = (d4(n_kv_heads=n).parameters(8192) for n in (None, 1))
    assert full.matrices - grouped.matrices == 4 * 2 * 256 * (256 - 64)
    assert full.head == grouped.head


def test_flops_of_d4_match_the_published_baseline():
    assert d4().flops_per_token(8192, 512) == 37_748_736  # 37.7 M in the peers' own count


def test_a_sliding_window_counts_only_what_it_sees():
    model = d4(window_pattern="SSSL")
    assert model.windows(512) == (256, 256, 256, 512)
    saved = d4().flops_per_token(8192, 512) - model.flops_per_token(8192, 512)
    assert saved == 3 * 12 * 256 * 256


def test_the_last_layer_sees_the_whole_row_whatever_the_pattern():
    assert d4(window_pattern="S").windows(128) == (64, 64, 64, 128)


def test_the_vocabulary_is_padded_to_64():
    assert [shape.pad_vocab(v) for v in (257, 8192, 50257)] == [320, 8192, 50304]


def test_the_reference_model_keeps_the_reference_batch_and_rates():
    model = GPTConfig(depth=12, head_dim=128)
    params = model.parameters(32_768)
    assert params.scaling == shape.REFERENCE_PARAMS
    batch = shape.derive_batch_tokens(params, 2048)
    assert batch == 2**19
    base = shape.Rates(0.003, 0.2, 0.004, 0.1)
    scaled = shape.scale_rates(base, model.dims().width, batch, round(12 * params.scaling))
    assert scaled == base


def test_a_quarter_of_the_batch_halves_every_rate_and_twice_the_tokens_halve_the_decay():
    base = shape.Rates(0.003, 0.2, 0.004, 0.1)
    tokens = 12 * shape.REFERENCE_PARAMS
    small = shape.scale_rates(base, 768, 2**17, tokens)
    assert small.matrix_lr == pytest.approx(base.matrix_lr / 2)
    assert small.weight_decay == pytest.approx(0.05)
    assert shape.scale_rates(base, 768, 2**19, 2 * tokens).weight_decay == pytest.approx(0.05)


@pytest.mark.parametrize(("orthogonal", "rate", "expected"), [(False, 0.003, 0.756), (True, 0.02, 5.04)])
def test_decay_has_one_time_scale_at_every_width_batch_and_horizon(orthogonal: bool, rate: float, expected: float):
    for depth in (2, 4, 6, 12, 20, 26):
        model = GPTConfig(depth=depth, head_dim=128)
        params = model.parameters(32_768)
        derived = shape.derive_batch_tokens(params, 512)
        for batch in (derived, derived // 4):
            for ratio in (1, 12, 100):
                steps = math.ceil(ratio * params.scaling / batch)
                scaled = shape.scale_rates(shape.Rates(rate, 0.2, 0.004, 0.1), model.dims().width, batch, steps * batch, orthogonal)
                shrink = scaled.matrix_lr * scaled.weight_decay
                assert shrink * steps == pytest.approx(min(expected, 0.1 * steps), rel=0.01)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_no_step_shrinks_a_matrix_by_more_than_a_tenth(orthogonal: bool):
    for steps in (1, 2, 5, 20, 1000):
        for width in (64, 128, 768, 2048):
            for decay in (0.0, 0.1, 50.0):
                base = shape.Rates(0.02 if orthogonal else 0.003, 0.2, 0.004, decay)
                scaled = shape.scale_rates(base, width, 2**13, steps * 2**13, orthogonal)
                assert 0 <= scaled.matrix_lr * scaled.weight_decay <= 0.1 * (1 + 1e-9)
                assert (scaled.weight_decay == 0) == (decay == 0)


def test_matrices_fall_with_width_faster_than_tables():
    base = shape.Rates(0.003, 0.2, 0.004, 0.1)
    wide = shape.scale_rates(base, 4 * 768, 2**19, 12 * shape.REFERENCE_PARAMS)
    assert wide.matrix_lr == pytest.approx(base.matrix_lr / 4)
    assert wide.embed_lr == pytest.approx(base.embed_lr / 2)
    assert wide.head_lr == pytest.approx(base.head_lr / 2)


def test_the_derived_batch_is_a_power_of_two_and_holds_a_row():
    for depth in (2, 6, 20, 32):
        params = GPTConfig(depth=depth, head_dim=64).parameters(32_768)
        batch = shape.derive_batch_tokens(params, 512)
        assert math.log2(batch).is_integer()
    tiny = shape.Parameters(embedding=10, matrices=10, head=10)
    assert shape.derive_batch_tokens(tiny, 2048) >= 2048
