import numpy as np
import pytest
import torch

from qlora_core.adapters.dense_rules import approximate, dare, dare_ties, drop_and_rescale, seed_of, ties
from qlora_core.adapters.low_rank import LowRank, compress, concatenate, inner, pad, singular_values
from qlora_core.errors import ModelError


def deltas(count: int = 3, shape: tuple[int, int] = (12, 17)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def parts(of: list[torch.Tensor], weights: list[float]) -> list:
    return [(lambda delta=delta: delta.clone(), weight) for delta, weight in zip(of, weights, strict=True)]


def ties_entry_by_entry(pruned: list[np.ndarray]) -> np.ndarray:
    """Yadav et al. 2023, algorithm 1, lines 8 to 14, one entry after the other in float64."""
    result = np.zeros_like(pruned[0])
    for place in np.ndindex(result.shape):
        values = [each[place] for each in pruned]
        sign = np.sign(sum(values))
        agreeing = [value for value in values if sign != 0 and np.sign(value) == sign]
        result[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


def trimmed(delta: torch.Tensor, density: float) -> np.ndarray:
    values = delta.double().numpy().copy()
    order = np.argsort(np.abs(values), axis=None)
    values.reshape(-1)[order[: values.size - round(density * values.size)]] = 0
    return values


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_the_papers_algorithm_on_deltas(density: float) -> None:
    of, weights = deltas(), [1.0, 0.5, -2.0]
    expected = ties_entry_by_entry([w * trimmed(d, density) for d, w in zip(of, weights, strict=True)])
    np.testing.assert_allclose(ties(parts(of, weights), density).double().numpy(), expected, atol=1e-6)


def test_dare_rules_are_their_formula_on_their_own_draws() -> None:
    of, weights, seeds = deltas(), [1.0, 0.5, 2.0], [1, 2, 3]
    dropped = [drop_and_rescale(delta, 0.4, seed).double().numpy() for delta, seed in zip(of, seeds, strict=True)]
    weighted = [w * d for w, d in zip(weights, dropped, strict=True)]
    np.testing.assert_allclose(dare(parts(of, weights), 0.4, seeds).double().numpy(), sum(weighted), atol=1e-6)
    found = dare_ties(parts(of, weights), 0.4, seeds).double().numpy()
    np.testing.assert_allclose(found, ties_entry_by_entry(weighted), atol=1e-6)


def test_dare_keeps_the_expectation_and_its_seed() -> None:
    delta = torch.ones(400, 500)
    dropped = drop_and_rescale(delta, 0.25, 7)
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)  # standard error 0.004
    assert torch.equal(dropped, drop_and_rescale(delta, 0.25, 7))
    assert not torch.equal(dropped, drop_and_rescale(delta, 0.25, 8))
    seeds = {seed_of(seed, digest, module) for seed in (0, 1) for digest in ("a", "b") for module in ("x", "y")}
    assert len(seeds) == 8


def test_an_svd_states_the_error_of_what_it_gives_small_or_randomized(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    delta = torch.randn(60, 40) @ torch.diag(0.8 ** torch.arange(40.0)) @ torch.randn(40, 80)
    values = torch.linalg.svdvals(delta.double())
    exact = approximate(delta, 8)
    assert exact.error == pytest.approx(values[8:].norm().item(), rel=1e-5)
    monkeypatch.setattr("qlora_core.adapters.dense_rules.EXACT_SVD_FEATURES", 10)
    state = torch.get_rng_state()
    randomized = approximate(delta, 8)
    measured = (delta.double() - randomized.kept.b_or.double() @ randomized.kept.a_ri.double()).norm().item()
    assert randomized.error == pytest.approx(measured, rel=1e-12)
    assert exact.error * (1 - 1e-9) <= randomized.error <= 1.01 * exact.error
    assert torch.equal(torch.get_rng_state(), state)


def random_update(rank: int, out: int = 20, wide: int = 30, seed: int = 1) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, wide, generator=generator), torch.randn(out, rank, generator=generator))


def test_factors_give_norm_inner_product_and_singular_values_of_the_delta() -> None:
    one, two = random_update(4), random_update(7, seed=2)
    dense = [each.b_or.double() @ each.a_ri.double() for each in (one, two)]
    assert one.norm() == pytest.approx(dense[0].norm().item(), rel=1e-12)
    assert inner(one, two) == pytest.approx((dense[0] * dense[1]).sum().item(), rel=1e-10)
    torch.testing.assert_close(singular_values(two), torch.linalg.svdvals(dense[1])[:7])


@pytest.mark.parametrize("rank", [3, 20, 40])
def test_compression_is_the_best_of_its_rank_and_exact_beyond_it(rank: int) -> None:
    """A sum of rank 25 whose true rank is 20, the number of outputs."""
    whole = concatenate([(random_update(25), 1.0)])
    dense = whole.b_or.double() @ whole.a_ri.double()
    found = compress(whole, rank)
    assert found.kept.rank == min(rank, 20)
    left = (dense - found.kept.b_or.double() @ found.kept.a_ri.double()).norm().item()
    best = torch.linalg.svdvals(dense)[rank:].norm().item()
    assert left == pytest.approx(best, rel=1e-6, abs=1e-5 * dense.norm().item())
    assert found.error == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_sums_that_are_none_are_refused() -> None:
    with pytest.raises(ModelError, match="have no sum"):
        concatenate([(random_update(2), 1.0), (random_update(2, out=21), 1.0)])
    with pytest.raises(ModelError, match="beyond float32"):
        concatenate([(random_update(2), 1e39)])
    with pytest.raises(ModelError, match="does not fit rank 1"):
        pad(random_update(2), 1)
    padded = pad(random_update(2), 5)
    assert padded.rank == 5
    assert torch.equal(padded.dense(), random_update(2).dense())
