"""The LoRA aggregation rules, against forms written in numpy and against the ideal average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pwff_opt.errors import TrainingError
from pwff_opt.federated.exchange.rules import Factors, Merged
from pwff_opt.federated.exchange.rules._factors import ideal
from pwff_opt.registry import RULES

INPUTS, OUTPUTS = 40, 56
MIXED = (2, 4, 8, 16)
WEIGHTS = (10.0, 30.0, 20.0, 40.0)
EQUAL_RANKS_ONLY = ("fedit", "ffa", "fedsa", "rolora", "fedex")
ANY_RANKS = ("hetlora", "hetlora-norm", "flora", "flexlora", "raflora")
MERGING = (*EQUAL_RANKS_ONLY, *ANY_RANKS)
Array = npt.NDArray[np.float64]


def draw(
    rank: int, seed: int, *, scale: float = 2.0, size: tuple[int, int] = (OUTPUTS, INPUTS)
) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        a=torch.randn(rank, size[1], generator=generator) / size[1] ** 0.5,
        b=torch.randn(size[0], rank, generator=generator),
        scale=scale,
    )


def cohort(ranks: Sequence[int], *, alpha: float | None = None) -> list[Factors]:
    """Devices with random factors; with alpha, of the scale alpha / sqrt(rank) (rsLoRA)."""
    return [
        draw(rank, seed, scale=2.0 if alpha is None else alpha / rank**0.5)
        for seed, rank in enumerate(ranks)
    ]


def common(ranks: Sequence[int], *, a: bool) -> list[Factors]:
    """Devices that share A, or B."""
    first, *others = cohort(ranks)
    return [first] + [
        Factors(a=first.a if a else own.a, b=own.b if a else first.b, scale=own.scale)
        for own in others
    ]


def fresh_of(held: Sequence[Factors]) -> Callable[[int], torch.Tensor]:
    size = (held[0].b.shape[0], held[0].a.shape[1])
    return lambda item: draw(held[item].rank, 1000 + item, size=size).a


def merge(
    name: str,
    sent: Sequence[Factors],
    weights: Sequence[float],
    held: Sequence[Factors] | None = None,
    round: int = 0,
) -> Merged:
    held = sent if held is None else held
    return RULES[name].merge(sent, weights, held, round=round, fresh=fresh_of(held))


def effective(merged: Merged, item: int) -> Array:
    own = merged.factors[item]
    change = own.scale * own.b.double() @ own.a.double()
    return (change if merged.delta is None else change + merged.delta.double()).numpy()


def product(own: Factors) -> Array:
    return own.scale * (own.b.double().numpy() @ own.a.double().numpy())


def dense_ideal(sent: Sequence[Factors], weights: Sequence[float]) -> Array:
    share = np.asarray(weights) / np.sum(weights)
    return np.sum([p * product(own) for p, own in zip(share, sent, strict=True)], axis=0)


def error(value: Array, reference: Array) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def truncated(dense: Array, rank: int) -> Array:
    u, s, v_t = np.linalg.svd(dense, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v_t[:rank]


def suitable(name: str) -> list[Factors]:
    return cohort(MIXED if name in ANY_RANKS else (4, 4, 4, 4))


def test_every_rule_of_a_scenario_is_there() -> None:
    assert list(RULES) == sorted((*MERGING, "personal"))


def test_what_rules_say_of_themselves() -> None:
    def those(fact: str) -> set[str]:
        return {name for name, rule in RULES.items() if getattr(rule, fact)}

    assert those("equal_ranks") == set(EQUAL_RANKS_ONLY)
    assert those("averages") == set(EQUAL_RANKS_ONLY) - {"fedex"}
    assert those("aggregates") == those("common_start") == set(MERGING)
    assert those("also_in_personal_layers") == {"ffa"}
    assert {name: rule.period for name, rule in RULES.items() if rule.period > 1} == {"rolora": 2}
    for rule in RULES.values():
        for round in range(2 * rule.period):
            assert rule.learns(round) == rule.learns(round % rule.period)
            assert rule.sends(round) == rule.sends(round % rule.period)


def test_the_personal_rule_sends_nothing_and_leaves_all_as_it_is() -> None:
    held = cohort(MIXED)
    assert RULES["personal"].sends(0) == (False, False)
    assert merge("personal", held, WEIGHTS).factors == tuple(held)


@pytest.mark.parametrize("name", MERGING)
def test_what_is_sent_has_been_trained_and_something_is(name: str) -> None:
    for round in range(4):
        learns, sends = RULES[name].learns(round), RULES[name].sends(round)
        assert any(sends)
        assert all(learned for learned, sent in zip(learns, sends, strict=True) if sent)


def test_which_factor_each_rule_trains_and_sends() -> None:
    both, only_a, only_b = (True, True), (True, False), (False, True)
    assert (RULES["fedit"].learns(0), RULES["fedit"].sends(0)) == (both, both)
    assert (RULES["ffa"].learns(1), RULES["ffa"].sends(1)) == (only_b, only_b)
    assert (RULES["fedsa"].learns(0), RULES["fedsa"].sends(0)) == (both, only_a)
    assert [RULES["rolora"].learns(round) for round in range(3)] == [only_b, only_a, only_b]
    assert [RULES["rolora"].sends(round) for round in range(3)] == [only_b, only_a, only_b]


def test_ideal_is_the_weighted_sum_of_products() -> None:
    sent = cohort(MIXED, alpha=8.0)
    value = ideal(sent, WEIGHTS)
    assert value.dtype is torch.float64
    np.testing.assert_allclose(value.numpy(), dense_ideal(sent, WEIGHTS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [MIXED, (4, 4, 4, 4)])
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_stacking_is_the_ideal_for_every_device(
    ranks: tuple[int, ...], alpha: float | None
) -> None:
    sent = cohort(ranks, alpha=alpha)
    merged = merge("flora", sent, WEIGHTS)
    for item, own in enumerate(merged.factors):
        assert error(effective(merged, item), dense_ideal(sent, WEIGHTS)) < 1e-6
        assert not own.b.any()
        assert torch.equal(own.a, fresh_of(sent)(item))


def test_the_residual_of_fedex_makes_averages_ideal_for_every_device() -> None:
    sent = cohort((4, 4, 4))
    held = [*sent, draw(4, 9)]
    merged = merge("fedex", sent, WEIGHTS[:3], held)
    plain = merge("fedit", sent, WEIGHTS[:3], held)
    for item in range(4):
        assert error(effective(merged, item), dense_ideal(sent, WEIGHTS[:3])) < 1e-6
        assert torch.equal(merged.factors[item].a, plain.factors[item].a)
        assert torch.equal(merged.factors[item].b, plain.factors[item].b)


def test_averaging_both_factors_is_not_the_ideal() -> None:
    sent = cohort((4, 4, 4))
    merged = merge("fedit", sent, WEIGHTS[:3])
    assert error(effective(merged, 0), dense_ideal(sent, WEIGHTS[:3])) > 0.1


@pytest.mark.parametrize(("name", "round"), [("ffa", 0), ("rolora", 0), ("rolora", 1)])
def test_one_common_factor_makes_the_average_ideal(name: str, round: int) -> None:
    sends_a, _ = RULES[name].sends(round)
    sent = common((4, 4, 4), a=not sends_a)
    merged = merge(name, sent, WEIGHTS[:3], round=round)
    for item in range(3):
        assert error(effective(merged, item), dense_ideal(sent, WEIGHTS[:3])) < 1e-6


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("round", [0, 1])
def test_identical_devices_keep_their_product(name: str, round: int) -> None:
    sent = [draw(4, 3)] * 3
    merged = merge(name, sent, WEIGHTS[:3], round=round)
    for item in range(3):
        assert error(effective(merged, item), product(sent[0])) < 1e-6


@pytest.mark.parametrize("round", [0, 1])
@pytest.mark.parametrize("name", ["fedit", "ffa", "fedsa", "rolora"])
def test_means_of_factors(name: str, round: int) -> None:
    sent, weights = cohort((4, 4, 4)), np.array([1.0, 2.0, 5.0])
    merged = merge(name, sent, weights.tolist(), round=round)
    mean_a = np.average([own.a.numpy() for own in sent], axis=0, weights=weights)
    mean_b = np.average([own.b.numpy() for own in sent], axis=0, weights=weights)
    with_a, with_b = RULES[name].sends(round)
    for own, before in zip(merged.factors, sent, strict=True):
        np.testing.assert_allclose(own.a, mean_a if with_a else before.a, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(own.b, mean_b if with_b else before.b, rtol=1e-5, atol=1e-7)
    assert merged.delta is None


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_zero_padding(alpha: float | None) -> None:
    sent = cohort(MIXED, alpha=alpha)
    merged = merge("hetlora", sent, WEIGHTS)
    share = np.asarray(WEIGHTS) / sum(WEIGHTS)
    padded_a, padded_b = np.zeros((4, 16, INPUTS)), np.zeros((4, OUTPUTS, 16))
    for k, own in enumerate(sent):
        padded_a[k, : own.rank] = own.a.numpy()
        padded_b[k, :, : own.rank] = own.scale * own.b.numpy()
    mean_a, mean_b = np.tensordot(share, padded_a, 1), np.tensordot(share, padded_b, 1)
    for own, rank in zip(merged.factors, MIXED, strict=True):
        np.testing.assert_allclose(own.a, mean_a[:rank], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(own.scale * own.b, mean_b[:, :rank], rtol=1e-5, atol=1e-6)


def test_zero_padding_with_the_weights_of_norms() -> None:
    sent = cohort(MIXED, alpha=8.0)
    norms = [float(np.linalg.norm(product(own))) for own in sent]
    own_rule = merge("hetlora-norm", sent, WEIGHTS)
    expected = merge("hetlora", sent, norms)
    for own, other in zip(own_rule.factors, expected.factors, strict=True):
        torch.testing.assert_close(own.a, other.a)
        torch.testing.assert_close(own.b, other.b)
    # Before anything is learned all norms are zero.
    empty = [Factors(a=own.a, b=torch.zeros_like(own.b), scale=own.scale) for own in sent]
    start = merge("hetlora-norm", empty, WEIGHTS)
    assert torch.equal(start.factors[3].a, merge("hetlora", empty, WEIGHTS).factors[3].a)


def test_slices_that_nobody_sent_stay() -> None:
    sent, absent = cohort((2, 4)), draw(8, 7, scale=0.5)
    merged = merge("hetlora", sent, WEIGHTS[:2], [*sent, absent])
    new = merged.factors[2]
    assert torch.equal(new.a[4:], absent.a[4:])
    assert torch.equal(new.b[:, 4:], absent.b[:, 4:])
    assert torch.equal(new.a[:4], merged.factors[1].a)
    torch.testing.assert_close(new.b[:, :4] * 0.5, merged.factors[1].b * 2.0)


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_each_device_gets_the_truncated_svd_of_the_ideal(alpha: float | None) -> None:
    sent = cohort(MIXED, alpha=alpha)
    merged = merge("flexlora", sent, WEIGHTS)
    dense = dense_ideal(sent, WEIGHTS)
    for item, own in enumerate(merged.factors):
        assert error(effective(merged, item), truncated(dense, own.rank)) < 1e-6
        # Singular values are split evenly, the scale apart.
        np.testing.assert_allclose(own.a.norm(dim=1), own.scale * own.b.norm(dim=0), rtol=1e-5)
        assert (own.b.gather(0, own.b.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_each_slice_is_averaged_over_the_devices_that_have_it() -> None:
    sent = cohort(MIXED, alpha=8.0)
    bounds = (0, *MIXED)
    dense = np.zeros((OUTPUTS, INPUTS))
    for low, high in pairwise(bounds):
        having = [(own, w) for own, w in zip(sent, WEIGHTS, strict=True) if own.rank >= high]
        total = sum(w for _, w in having)
        for own, w in having:
            b, a = own.b.double().numpy(), own.a.double().numpy()
            dense += own.scale * w / total * (b[:, low:high] @ a[low:high])
    merged = merge("raflora", sent, WEIGHTS)
    for item, own in enumerate(merged.factors):
        assert error(effective(merged, item), truncated(dense, own.rank)) < 1e-6
    assert error(dense, dense_ideal(sent, WEIGHTS)) > 0.1


def test_at_equal_ranks_slices_weigh_as_devices_do() -> None:
    sent = cohort((4, 4, 4))
    ours, theirs = merge("raflora", sent, WEIGHTS[:3]), merge("flexlora", sent, WEIGHTS[:3])
    for item in range(3):
        assert error(effective(ours, item), effective(theirs, item)) < 1e-6


@pytest.mark.parametrize("name", ["flexlora", "raflora"])
def test_a_rank_beyond_the_product_is_filled_with_slices_that_can_learn(name: str) -> None:
    sent = [draw(2, 1)] * 2
    held = [*sent, draw(8, 5)]
    merged = merge(name, sent, [1.0, 3.0], held)
    new = merged.factors[2]
    assert error(effective(merged, 2), product(sent[0])) < 1e-6
    assert torch.equal(new.a[2:], fresh_of(held)(2)[2:])
    assert not new.b[:, 2:].any()


@pytest.mark.parametrize("name", ["flexlora", "raflora"])
def test_nothing_learned_yet_is_a_fresh_start(name: str) -> None:
    sent = [Factors(a=own.a, b=torch.zeros_like(own.b), scale=1.0) for own in cohort(MIXED)]
    merged = merge(name, sent, WEIGHTS)
    for item, own in enumerate(merged.factors):
        assert torch.equal(own.a, fresh_of(sent)(item))
        assert not own.b.any()


def test_more_slices_than_rows() -> None:
    sent = [draw(6, seed, size=(10, 7)) for seed in range(3)]
    merged = merge("flexlora", sent, WEIGHTS[:3])
    assert error(effective(merged, 0), truncated(dense_ideal(sent, WEIGHTS[:3]), 6)) < 1e-6


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("round", [0, 1])
def test_order_of_devices_is_immaterial(name: str, round: int) -> None:
    sent, order = suitable(name), [2, 0, 3, 1]
    one = merge(name, sent, WEIGHTS, round=round)
    held = [sent[k] for k in order]
    two = RULES[name].merge(
        held,
        [WEIGHTS[k] for k in order],
        held,
        round=round,
        fresh=lambda item: fresh_of(sent)(order[item]),
    )
    for place, k in enumerate(order):
        torch.testing.assert_close(two.factors[place].a, one.factors[k].a, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(two.factors[place].b, one.factors[k].b, rtol=1e-6, atol=1e-6)
    if one.delta is not None:
        torch.testing.assert_close(two.delta, one.delta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MERGING)
def test_only_ratios_of_weights_matter(name: str) -> None:
    sent = suitable(name)
    one = merge(name, sent, WEIGHTS)
    two = merge(name, sent, [w / 512 for w in WEIGHTS])
    for item in range(4):
        np.testing.assert_allclose(effective(two, item), effective(one, item), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("round", [0, 1])
def test_what_is_not_sent_is_not_read(name: str, round: int) -> None:
    held = suitable(name)
    with_a, with_b = RULES[name].sends(round)
    hidden = [
        Factors(
            a=own.a if with_a else torch.full_like(own.a, torch.nan),
            b=own.b if with_b else torch.full_like(own.b, torch.nan),
            scale=own.scale,
        )
        for own in held
    ]
    one = merge(name, hidden, WEIGHTS, held, round=round)
    two = merge(name, held, WEIGHTS, held, round=round)
    for own, other in zip(one.factors, two.factors, strict=True):
        assert torch.equal(own.a, other.a)
        assert torch.equal(own.b, other.b)


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("round", [0, 1])
def test_devices_that_took_no_part_get_the_result_too(name: str, round: int) -> None:
    held = suitable(name)
    sent, weights = held[1:], WEIGHTS[1:]
    twin = [Factors(a=held[1].a, b=held[1].b, scale=held[0].scale), *sent]
    # The absent device has other factors but the rank of one that took part.
    absent = [draw(held[1].rank, 77), *sent]
    merged = merge(name, sent, weights, absent, round=round)
    expected = merge(name, sent, weights, twin, round=round)
    with_a, with_b = RULES[name].sends(round)
    if with_a:
        assert torch.equal(merged.factors[0].a, expected.factors[0].a)
    if with_b:
        assert torch.equal(merged.factors[0].b, expected.factors[0].b)
    # What it alone holds cannot have reached the others.
    for own, other in zip(merged.factors[1:], expected.factors[1:], strict=True):
        assert torch.equal(own.a, other.a)
        assert torch.equal(own.b, other.b)


@pytest.mark.parametrize("name", MERGING)
def test_without_senders_all_keep_what_they_hold(name: str) -> None:
    held = suitable(name)
    merged = merge(name, [], [], held)
    assert merged.delta is None
    for own, before in zip(merged.factors, held, strict=True):
        assert own.a is before.a
        assert own.b is before.b


@pytest.mark.parametrize("name", MERGING)
def test_shapes_scales_and_types_stay_and_inputs_are_not_written(name: str) -> None:
    sent = suitable(name)
    before = [(own.a.clone(), own.b.clone()) for own in sent]
    merged = merge(name, sent, WEIGHTS)
    assert len(merged.factors) == len(sent)
    for own, old, (a, b) in zip(merged.factors, sent, before, strict=True):
        assert (own.a.shape, own.b.shape, own.scale) == (old.a.shape, old.b.shape, old.scale)
        assert own.a.dtype is own.b.dtype is torch.float32
        assert own.a.is_contiguous()
        assert own.b.is_contiguous()
        assert torch.equal(old.a, a)
        assert torch.equal(old.b, b)
    if merged.delta is not None:
        assert merged.delta.shape == (OUTPUTS, INPUTS)
        assert merged.delta.dtype is torch.float32


@pytest.mark.parametrize("name", EQUAL_RANKS_ONLY)
def test_unequal_ranks_or_scales_are_refused(name: str) -> None:
    with pytest.raises(TrainingError, match=r"ranks 2 \(scale 2\), 4 \(scale 2\)"):
        merge(name, cohort((4, 2)), [1.0, 1.0])
    with pytest.raises(TrainingError, match=r"4 \(scale 1\), 4 \(scale 2\)"):
        merge(name, [draw(4, 0)], [1.0], [draw(4, 0), draw(4, 1, scale=1.0)])


def test_weights_that_sum_to_nothing_are_refused() -> None:
    with pytest.raises(TrainingError, match="sum to 0"):
        merge("flora", cohort((2, 4)), [0.0, 0.0])


def test_relative_errors_to_the_ideal() -> None:
    # Ranks 2, 4, 8, 16, equal weights: the orders that our field notes record.
    sent, weights = cohort(MIXED), [1.0] * 4
    reference = dense_ideal(sent, weights)
    stacked = merge("flora", sent, weights)
    padded, cut = merge("hetlora", sent, weights), merge("flexlora", sent, weights)
    assert error(effective(stacked, 0), reference) < 1e-6
    assert 0.7 < error(effective(padded, 3), reference) < 0.95
    assert 0.2 < error(effective(cut, 3), reference) < 0.4
    assert 0.6 < error(effective(cut, 1), reference) < 0.85
    # The best approximation of a rank beats every other of that rank.
    for name in ("hetlora", "raflora"):
        other = merge(name, sent, weights)
        for item in range(4):
            assert error(effective(cut, item), reference) <= error(
                effective(other, item), reference
            )


@settings(deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    weights=st.lists(st.floats(0.1, 100.0), min_size=5, max_size=5),
    alpha=st.sampled_from([None, 4.0]),
    seed=st.integers(0, 10_000),
)
def test_any_cohort(ranks: list[int], weights: list[float], alpha: float | None, seed: int) -> None:
    sent = [
        draw(rank, seed + k, scale=2.0 if alpha is None else alpha / rank, size=(9, 7))
        for k, rank in enumerate(ranks)
    ]
    used = weights[: len(ranks)]
    reference = dense_ideal(sent, used)
    stacked, cut = merge("flora", sent, used), merge("flexlora", sent, used)
    for item, rank in enumerate(ranks):
        assert error(effective(stacked, item), reference) < 1e-6
        best = np.linalg.norm(truncated(reference, rank) - reference)
        ours = np.linalg.norm(effective(cut, item) - reference)
        assert abs(ours - best) < 1e-6 * np.linalg.norm(reference)
    # Every rule weighs a device given twice like one of double weight, but for the one of its own weights.
    for name in set(ANY_RANKS) - {"hetlora-norm"}:
        twice = merge(name, [*sent, sent[0]], [*used, used[0]], sent)
        once = merge(name, sent, [2 * used[0], *used[1:]])
        for item in range(len(ranks)):
            value, expected = effective(twice, item), effective(once, item)
            assert np.linalg.norm(value - expected) < 1e-5 * np.linalg.norm(reference)


def test_one_svd_serves_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    svd = torch.linalg.svd

    def counted(matrix: torch.Tensor, **options: bool) -> tuple[torch.Tensor, ...]:
        shapes.append(tuple(matrix.shape))
        return tuple(svd(matrix, **options))

    monkeypatch.setattr(torch.linalg, "svd", counted)
    merge("flexlora", cohort(MIXED), WEIGHTS)
    assert shapes == [(sum(MIXED),) * 2]
