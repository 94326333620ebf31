"""Spectra of updates, on matrices whose singular values and vectors were planted."""

import numpy as np
import pytest

from minilora.lora.spectra import (
    amplification,
    chance_similarity,
    closest_cosines,
    effective_rank,
    intruder_dimensions,
    rank_for_energy,
    row_changes,
    singular_values,
    subspace_similarities,
    subspace_similarity,
    svd,
)

EXACT = {np.float64: 1e-12, np.float32: 2e-5}  # by dtype: how far rounding may take a number near 1
each_dtype = pytest.mark.parametrize("dtype", EXACT)


def basis(rng, n, k):
    """k orthonormal columns in n dimensions."""
    return np.linalg.qr(rng.standard_normal((n, k)))[0]


def planted(rng, m, n, values, dtype=np.float64):
    """A matrix with these singular values, and its planted vectors: (matrix, u (m, k), v (n, k))."""
    u, v = basis(rng, m, len(values)), basis(rng, n, len(values))
    return ((u * values) @ v.T).astype(dtype), u, v


def factors(rng, m, n, values, dtype=np.float64):
    """B and A of such a matrix, mixed by a random (r, r) matrix so that neither has orthogonal rows."""
    _, u, v = planted(rng, m, n, values)
    mix = rng.standard_normal((len(values), len(values)))
    return ((u * values) @ mix).astype(dtype), (np.linalg.inv(mix) @ v.T).astype(dtype)


# -- singular values ---------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (20, 20)])
def test_singular_values_are_those_planted(rng, shape, dtype):
    values = np.array([5.0, 2.0, 0.5])
    matrix, _, _ = planted(rng, *shape, values, dtype)
    found = singular_values(matrix)
    assert found.dtype == dtype and found.shape == (20,)
    np.testing.assert_allclose(found[:3], values, rtol=EXACT[dtype])
    assert found[3:].max() < 5 * EXACT[dtype]


@each_dtype
@pytest.mark.parametrize("shape", [(20, 30), (3, 30), (30, 2), (2, 3)])  # also with fewer rows or columns than r
def test_a_pair_of_factors_has_the_decomposition_of_its_product(rng, shape, dtype):
    m, n = shape
    b, a = rng.standard_normal((m, 4)).astype(dtype), rng.standard_normal((4, n)).astype(dtype)
    u, s, vt = svd((b, a))
    k = min(m, n, 4)
    assert u.shape == (m, k) and s.shape == (k,) and vt.shape == (k, n)
    assert u.dtype == s.dtype == vt.dtype == dtype
    np.testing.assert_allclose((u * s) @ vt, b @ a, atol=20 * EXACT[dtype])
    np.testing.assert_allclose(u.T @ u, np.eye(k), atol=EXACT[dtype])
    np.testing.assert_allclose(vt @ vt.T, np.eye(k), atol=EXACT[dtype])
    np.testing.assert_allclose(s, singular_values(b @ a)[:k], rtol=EXACT[dtype], atol=20 * EXACT[dtype])
    np.testing.assert_array_equal(singular_values((b, a)), s)


def test_the_product_of_factors_is_never_made(rng):
    """It would have 40 GB."""
    b, a = rng.standard_normal((100_000, 2)), rng.standard_normal((2, 50_000))
    s = singular_values((b, a))
    np.testing.assert_allclose((s**2).sum(), np.trace((b.T @ b) @ (a @ a.T)))


def test_half_precision_and_integers_are_computed_in_more(rng):
    assert singular_values(np.eye(3, dtype=np.float16)).dtype == np.float32
    assert singular_values(np.eye(3, dtype=int)).dtype == np.float64


# -- how many directions -----------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("k", [1, 3, 7])
def test_k_equal_singular_values_have_effective_rank_k(rng, k, dtype):
    b, a = factors(rng, 30, 40, np.full(k, 2.0), dtype)
    assert effective_rank(singular_values((b, a))) == pytest.approx(k, rel=1e-4)


def test_effective_rank_is_by_the_values_themselves_and_not_by_their_squares():
    p = np.array([0.75, 0.25])
    assert effective_rank(4 * p) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert effective_rank(np.array([3.0, 0.0, 1.0])) == effective_rank(np.array([3.0, 1.0]))


def test_the_rank_for_energy_counts_squares():
    values = np.array([3.0, 1.0, 0.5, 2.0])  # squares 9, 4, 1, 0.25 of 14.25
    assert [rank_for_energy(values, share) for share in (0.5, 0.63, 0.64, 0.9, 0.92, 0.98, 0.99, 1)] == [
        *(1, 1, 2, 2, 3, 3, 4, 4)
    ]
    assert rank_for_energy(values) == 2


def test_an_exact_share_needs_no_direction_more():
    assert [rank_for_energy(np.ones(10), k / 10) for k in range(1, 11)] == [*range(1, 11)]
    assert rank_for_energy(np.array([1.0, 0.0, 0.0]), 1) == 1


# -- where they point --------------------------------------------------------------------------------------------------


@each_dtype
def test_similarity_of_planted_subspaces(rng, dtype):
    """The first direction is shared, the second is at an angle of 60 degrees, the third is at right angles."""
    v = basis(rng, 50, 5)
    turned = 0.5 * v[:, 1] + np.sqrt(0.75) * v[:, 3]
    values = np.array([[4.0], [2.0], [1.0]])
    one = (values * v[:, :3].T).astype(dtype)
    other = (values * np.stack([v[:, 0], turned, v[:, 4]])).astype(dtype)
    expected = np.array([[1, 1, 1], [1, 1.25 / 2, 1.25 / 2], [1, 1.25 / 2, 1.25 / 3]])
    np.testing.assert_allclose(subspace_similarities(one, other), expected, atol=10 * EXACT[dtype])
    assert subspace_similarity(one, other, 2, 3) == pytest.approx(1.25 / 2, abs=10 * EXACT[dtype])


def test_similarity_is_that_of_the_update_whatever_the_factors(rng):
    b, a = factors(rng, 30, 40, np.array([3.0, 2.0, 1.0]))
    table = subspace_similarities((b, a), b @ a)
    assert table.shape == (3, 3)  # of 30 singular vectors only three belong to the update
    np.testing.assert_allclose(np.diag(table), 1)


def test_orthogonal_subspaces_share_nothing(rng):
    v = basis(rng, 12, 6).T
    assert subspace_similarities(v[:3], v[3:]).max() < 1e-12


def test_chance_is_the_mean_over_random_directions(rng):
    i, j, n = 2, 5, 40
    found = [subspace_similarity(rng.standard_normal((i, n)), rng.standard_normal((j, n)), i, j) for _ in range(400)]
    assert chance_similarity(i, j, n) == chance_similarity(j, i, n) == j / n
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - j / n) < 4 * error
    assert error < 0.01 * i


# -- amplification -----------------------------------------------------------------------------------------------------


@each_dtype
def test_an_update_along_known_directions_of_w(rng, dtype):
    """W has the values 10 and 0.5 along two planted directions; an update of 4 along the second amplifies it by 8."""
    w, u, v = planted(rng, 30, 20, np.array([10.0, 0.5]), dtype)
    weak = ((4 * u[:, 1:]).astype(dtype), v[:, 1:].T.astype(dtype))
    found = amplification(weak, w)
    norm = np.hypot(10, 0.5)
    expected = (8, 4, 0.5, 10, norm / np.sqrt(600))
    np.testing.assert_allclose(found, expected, rtol=20 * EXACT[dtype])
    strong = amplification((4 * u[:, :1], v[:, :1].T), w)
    assert (strong.factor, strong.seen) == pytest.approx((0.4, 10), rel=1e-4)
    np.testing.assert_allclose(amplification(weak[0] @ weak[1], w), expected, rtol=20 * EXACT[dtype])


def test_amplification_by_the_first_r_directions(rng):
    w, u, v = planted(rng, 30, 20, np.array([10.0, 0.5]))
    both = u @ np.diag([3.0, 4.0]) @ v.T  # 4 along the weak direction comes first
    assert amplification(both, w, r=1).seen == pytest.approx(0.5)
    assert amplification(both, w).seen == pytest.approx(np.hypot(10, 0.5))
    assert amplification(both, w, r=2) == amplification(both, w)


def test_chance_is_what_random_directions_see(rng):
    w = rng.standard_normal((24, 36)) * np.linspace(1, 4, 36)
    square = [
        amplification((rng.standard_normal((24, 3)), rng.standard_normal((3, 36))), w).seen ** 2 for _ in range(300)
    ]
    found = amplification((rng.standard_normal((24, 3)), rng.standard_normal((3, 36))), w)
    assert np.mean(square) == pytest.approx(found.chance**2, rel=0.1)
    assert found.top > 2 * found.chance


# -- intruders ---------------------------------------------------------------------------------------------------------


@each_dtype
def test_planted_intruders_are_counted(rng, dtype):
    """W has a hundred directions of values up to 1; two directions that are far from all of them come in above."""
    n = 128
    w, u, _ = planted(rng, n, n, np.linspace(1, 0.5, n), dtype)
    spread = (u @ np.sign(rng.standard_normal((n, 2)))) / np.sqrt(n)  # a cosine of 1/√n with each of W's
    new = np.linalg.qr(spread)[0]
    tuned = w + (50 * new @ basis(rng, n, 2).T).astype(dtype)
    assert intruder_dimensions(w, tuned, k=2) == 2
    assert closest_cosines(w, tuned, 2).max() < 0.3


@each_dtype
def test_what_only_grows_is_no_intruder(rng, dtype):
    values = np.linspace(3, 1, 16)
    w, u, v = planted(rng, 16, 24, values, dtype)
    tuned = w + (9 * u[:, 3:5] @ v[:, 3:5].T).astype(dtype)
    np.testing.assert_allclose(closest_cosines(w, tuned, 10), 1, atol=1e-3)
    assert intruder_dimensions(w, tuned) == 0
    assert intruder_dimensions(w, -w) == 0  # a sign is no direction


def test_an_intruder_at_a_known_angle(rng):
    """One column of U leaves W's directions by an angle: it counts from the cosine of that angle on."""
    u, v = basis(rng, 40, 6), basis(rng, 30, 5)
    values = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    turned = u[:, :5].copy()
    turned[:, 1] = 0.6 * u[:, 1] + 0.8 * u[:, 5]
    w, tuned = (u[:, :5] * values) @ v.T, (turned * values) @ v.T
    np.testing.assert_allclose(closest_cosines(w, tuned, 3), [1, 0.6, 1])
    assert [intruder_dimensions(w, tuned, 3, epsilon) for epsilon in (0.5, 0.59, 0.61, 0.9)] == [0, 0, 1, 1]
    assert intruder_dimensions(w, tuned, k=1, epsilon=0.9) == 0


# -- length and direction ----------------------------------------------------------------------------------------------


@each_dtype
def test_rows_that_grow_and_rows_that_turn(dtype):
    w = np.array([[2.0, 0, 0], [0, 3.0, 0]], dtype)
    assert row_changes(w, w) == (0, 0)
    assert row_changes(w, 1.5 * w) == pytest.approx((1.25, 0))
    assert row_changes(w, np.array([[0, 2.0, 0], [0, 3.0, 0]], dtype)) == pytest.approx((0, 0.5))
    assert row_changes(w, np.array([[1.0, 0, 0], [0, 0, -6.0]], dtype)) == pytest.approx(((1 + 3) / 2, 0.5))


def test_a_small_turn_is_not_lost_in_rounding():
    w = np.array([[1.0, 0.0]], np.float32)
    turned = np.array([[1.0, 1e-5]], np.float32)
    assert row_changes(w, turned)[1] == pytest.approx(0.5e-10, rel=1e-3)


# -- what means nothing ------------------------------------------------------------------------------------------------

EYE, ONES = np.eye(4), np.ones((4, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: svd(np.ones(3)), r"must be a matrix with rows and columns, got shape \(3,\)"),
        (lambda: svd(np.ones((0, 3))), "rows and columns"),
        (lambda: svd(np.full((2, 2), np.nan)), "NaN or infinity"),
        (lambda: singular_values(np.full((2, 2), np.inf)), "NaN or infinity"),
        (lambda: svd((ONES, ONES, ONES)), r"a pair \(B, A\), got 3"),
        (lambda: svd((np.ones((4, 2)), np.ones((3, 4)))), "no product"),
        (lambda: effective_rank(np.zeros(3)), "all singular values are zero"),
        (lambda: effective_rank(np.array([1.0, -1.0])), "none of them negative"),
        (lambda: effective_rank(np.array([1.0, np.nan])), "finite"),
        (lambda: effective_rank(ONES), "a list of finite numbers"),
        (lambda: rank_for_energy(np.zeros(3)), "all singular values are zero"),
        (lambda: rank_for_energy(np.ones(3), 0), "share must be above 0 and at most 1, got 0"),
        (lambda: rank_for_energy(np.ones(3), 1.5), "got 1.5"),
        (lambda: subspace_similarity(EYE, EYE, 0, 1), "i counts directions, from 1 to 4 here, got 0"),
        (lambda: subspace_similarity(EYE, ONES, 1, 2), "j counts directions, from 1 to 1 here, got 2"),
        (lambda: subspace_similarities(EYE, np.ones((4, 5))), "take 4 and 5 inputs"),
        (lambda: subspace_similarities(EYE, np.zeros((4, 4))), "the update is zero"),
        (lambda: chance_similarity(1, 5, 4), "from 1 to the 4 dimensions"),
        (lambda: chance_similarity(0, 1, 4), "from 1 to the 4 dimensions"),
        (lambda: amplification(np.zeros((4, 4)), EYE), "the update is zero"),
        (lambda: amplification(EYE, np.ones((4, 5))), "the update is 4 x 4 and W 4 x 5"),
        (lambda: amplification(EYE, EYE, r=5), "from 1 to the update's rank 4, got 5"),
        (lambda: amplification(ONES, EYE, r=2), "rank 1, got 2"),
        (lambda: amplification(np.diag([1.0, 0]), np.diag([0, 1.0])), "W does nothing"),
        (lambda: intruder_dimensions(EYE, EYE, k=5), "k must be from 1 to 4"),
        (lambda: intruder_dimensions(EYE, EYE, k=0), "k must be from 1 to 4"),
        (lambda: intruder_dimensions(EYE, np.ones((4, 5)), k=2), "must have one shape"),
        (lambda: intruder_dimensions(EYE, EYE, k=2, epsilon=0), "epsilon is a cosine"),
        (lambda: intruder_dimensions(EYE, EYE, k=2, epsilon=1.1), "epsilon is a cosine"),
        (lambda: row_changes(EYE, np.ones((4, 5))), "must have one shape"),
        (lambda: row_changes(np.zeros((4, 4)), EYE), "a row of zeros"),
    ],
)
def test_what_means_nothing_is_refused_in_a_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
