"""The counter-based dropout: published words, one function on every device, and what a mask depends on."""

import torch

from qlora_core.training.pack.dropout import dropout_factors, module_key, philox


def _places(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count) % 7, torch.arange(count) // 7


def test_philox_gives_the_published_words() -> None:
    # Known answers of Random123 (kat_vectors, philox 4x32 10)
    for word, key, expected in (
        (0, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ):
        counter = [torch.tensor([word])] * 4
        assert [int(value) for value in philox(counter, key)] == expected


def test_the_compiled_way_draws_what_the_tensor_way_draws() -> None:
    tokens, rows = _places(40)
    key, step, rate = module_key(3, "model.layers.0.q_proj"), 12, 0.25
    for features in (1, 6, 64):
        drawn = dropout_factors(tokens, rows, step, key, features, rate)
        blocks = torch.arange(features) // 4
        for place in (0, 11, 39):
            counter = [
                blocks,
                tokens[place].expand(features),
                rows[place].expand(features),
                torch.full((features,), step),
            ]
            words = torch.stack(philox(counter, key))[torch.arange(features) % 4, torch.arange(features)]
            expected = (words >= int(rate * 2**32)).float() / (1 - rate)
            torch.testing.assert_close(drawn[place], expected)


def test_the_share_and_the_mean_are_those_asked_for() -> None:
    tokens, rows = _places(700)
    drawn = dropout_factors(tokens, rows, 0, (1, 2), 256, 0.1)
    # 179,200 draws: three standard deviations are .0021
    assert abs((drawn == 0).float().mean().item() - 0.1) < 0.0022
    assert abs(drawn.mean().item() - 1) < 0.003


def test_a_mask_depends_on_place_row_step_module_and_seed_and_on_nothing_else() -> None:
    tokens, rows = _places(14)
    key = module_key(0, "a")
    drawn = dropout_factors(tokens, rows, 3, key, 64, 0.5)
    assert torch.equal(dropout_factors(tokens[7:], rows[7:], 3, key, 64, 0.5), drawn[7:])
    others = [
        dropout_factors(tokens, rows + 1, 3, key, 64, 0.5),
        dropout_factors(tokens + 1, rows, 3, key, 64, 0.5),
        dropout_factors(tokens, rows, 4, key, 64, 0.5),
        dropout_factors(tokens, rows, 3, module_key(0, "b"), 64, 0.5),
        dropout_factors(tokens, rows, 3, module_key(1, "a"), 64, 0.5),
    ]
    for other in others:
        assert 0.4 < (other == drawn).float().mean() < 0.6


def test_no_tokens_give_no_factors() -> None:
    none = torch.empty(0, dtype=torch.long)
    assert dropout_factors(none, none, 0, (1, 2), 8, 0.1).shape == (0, 8)
