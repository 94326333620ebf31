"""Spectra of updates, on matrices whose singular values and vectors are known."""

import numpy as np
import pytest

from minilora.lora.spectra import (
    amplification,
    chance_similarity,
    closest_cosines,
    intruder_dimensions,
    rank_for_variance,
    row_changes,
    singular_values,
    subspace_similarities,
    svd,
)

EXACT = {np.float64: 1e-12, np.float32: 2e-5}  # by dtype: the rounding error of a number near 1
each_dtype = pytest.mark.parametrize("dtype", EXACT)


def basis(rng, n, k):
    """k orthonormal columns in n dimensions."""
    return np.linalg.qr(rng.standard_normal((n, k)))[0]


def planted(rng, m, n, values, dtype=np.float64):
    """A matrix with these singular values, and its singular vectors: (matrix, u (m, k), v (n, k))."""
    u, v = basis(rng, m, len(values)), basis(rng, n, len(values))
    return ((u * values) @ v.T).astype(dtype), u, v


def factors(rng, m, n, values, dtype=np.float64):
    """B and A of such a matrix, mixed by a random (r, r) matrix so that neither has orthogonal rows."""
    _, u, v = planted(rng, m, n, values)
    mix = rng.standard_normal((len(values), len(values)))
    return ((u * values) @ mix).astype(dtype), (np.linalg.inv(mix) @ v.T).astype(dtype)


# -- singular values ---------------------------------------------------------------------------------------------------


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
    matrix, _, _ = planted(rng, m, n, np.array([5.0, 0.5]), dtype)
    found = singular_values(matrix)
    assert found.dtype == dtype and found.shape == (min(m, n),)
    np.testing.assert_allclose(found[:2], [5, 0.5], rtol=10 * EXACT[dtype])


def test_the_product_of_factors_is_never_formed(rng):
    """It would have 40 GB."""
    b, a = rng.standard_normal((100_000, 2)), rng.standard_normal((2, 50_000))
    np.testing.assert_allclose((singular_values((b, a)) ** 2).sum(), np.trace((b.T @ b) @ (a @ a.T)))


def test_half_precision_and_integers_are_computed_in_more():
    assert singular_values(np.eye(3, dtype=np.float16)).dtype == np.float32
    assert singular_values(np.eye(3, dtype=int)).dtype == np.float64


def test_the_rank_for_a_share_of_the_variance_counts_squares():
    values = np.array([3.0, 1.0, 0.5, 2.0])  # squares 9, 4, 1, 0.25 of 14.25
    found = [rank_for_variance(values, share) for share in (0.5, 0.63, 0.64, 0.9, 0.92, 0.98, 0.99, 1)]
    assert found == [1, 1, 2, 2, 3, 3, 4, 4] and rank_for_variance(values) == 2
    for n in (25, 29, 38):  # exact shares, of which some round up
        assert [rank_for_variance(np.ones(n), k / n) for k in range(1, n + 1)] == [*range(1, n + 1)]
    assert rank_for_variance(np.array([1.0, 0.0, 0.0]), 1) == 1


# -- subspaces ---------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_similarity_of_known_subspaces_at_any_scale(rng, dtype, scale):
    """The first direction is shared, the second is at an angle of 60 degrees, the third is at right angles."""
    v = basis(rng, 50, 5)
    turned = 0.5 * v[:, 1] + np.sqrt(0.75) * v[:, 3]
    values = np.array([[4.0], [2.0], [1.0]]) * scale
    one = (values * v[:, :3].T).astype(dtype)
    other = (values * np.stack([v[:, 0], turned, v[:, 4]])).astype(dtype)
    expected = np.array([[1, 1, 1], [1, 1.25 / 2, 1.25 / 2], [1, 1.25 / 2, 1.25 / 3]])
    np.testing.assert_allclose(subspace_similarities(one, other), expected, atol=10 * EXACT[dtype])
    b, a = factors(rng, 30, 40, 3.0 * values[:, 0], dtype)
    table = subspace_similarities((b, a), b @ a)
    assert table.shape == (3, 3)  # of 30 singular vectors only three belong to the update
    np.testing.assert_allclose(np.diag(table), 1, atol=0.01)


def test_chance_is_the_mean_over_random_subspaces(rng):
    i, j, n = 2, 5, 40
    pairs = [(rng.standard_normal((i, n)), rng.standard_normal((j, n))) for _ in range(200)]
    found = [subspace_similarities(*pair)[i - 1, j - 1] for pair in pairs]
    assert chance_similarity(i, j, n) == chance_similarity(j, i, n) == j / n
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - j / n) < 4 * error < 0.06
    v = basis(rng, 12, 6).T
    assert subspace_similarities(v[:3], v[3:]).max() < 1e-12  # orthogonal ones share nothing


# -- amplification -----------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_an_update_along_known_directions_of_w(rng, dtype, scale):
    """W has the singular values 10 and 0.5; an update of 4 along the second amplifies it by 8, at any scale of both."""
    w, u, v = planted(rng, 30, 20, np.array([10.0, 0.5]) * scale, dtype)
    weak = ((4 * scale * u[:, 1:]).astype(dtype), v[:, 1:].T.astype(dtype))
    expected = np.array([8 / scale, 4, 0.5, 10, np.hypot(10, 0.5) / np.sqrt(600)]) * scale
    for update in (weak, weak[0] @ weak[1]):
        np.testing.assert_allclose(amplification(update, w), expected, rtol=20 * EXACT[dtype])
    strong = amplification((4 * u[:, :1], v[:, :1].T), w)
    assert (strong.factor, strong.seen) == pytest.approx((0.4 / scale, 10 * scale), rel=1e-4)


def test_amplification_by_the_first_r_directions(rng):
    w, u, v = planted(rng, 30, 20, np.array([10.0, 0.5]))
    both = u @ np.diag([3.0, 4.0]) @ v.T  # 4 along the weak direction comes first
    assert amplification(both, w, r=1).seen == pytest.approx(0.5)
    assert amplification(both, w).seen == pytest.approx(np.hypot(10, 0.5))
    assert amplification(both, w, r=2) == amplification(both, w)


def test_chance_is_what_random_directions_see(rng):
    w = rng.standard_normal((24, 36)) * np.linspace(1, 4, 36)
    found = [amplification((rng.standard_normal((24, 3)), rng.standard_normal((3, 36))), w) for _ in range(200)]
    assert np.mean([one.seen**2 for one in found]) == pytest.approx(found[0].chance ** 2, rel=0.1)
    assert found[0].top > 2 * found[0].chance


# -- intruder dimensions -----------------------------------------------------------------------------------------------


@each_dtype
def test_new_directions_above_all_of_ws_are_intruders_and_grown_ones_are_not(rng, dtype):
    n = 64
    w, u, v = planted(rng, n, n, np.linspace(1, 0.5, n), dtype)
    even = np.linalg.qr((u @ np.sign(rng.standard_normal((n, 2)))) / np.sqrt(n))[0]  # |cosine| 1/√n with each of W's
    tuned = w + (50 * even @ basis(rng, n, 2).T).astype(dtype)
    assert intruder_dimensions(w, tuned, k=2) == 2 and closest_cosines(w, tuned, 2).max() < 0.45
    grown = w + (9 * u[:, 3:5] @ v[:, 3:5].T).astype(dtype)
    np.testing.assert_allclose(closest_cosines(w, grown, 2), 1, atol=1e-3)
    assert intruder_dimensions(w, grown) == intruder_dimensions(w, -w) == 0  # signs are ignored


def test_an_intruder_at_a_known_angle(rng):
    u, v = basis(rng, 40, 6), basis(rng, 30, 5)
    values = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    turned = u[:, :5].copy()
    turned[:, 1] = 0.6 * u[:, 1] + 0.8 * u[:, 5]
    w, tuned = (u[:, :5] * values) @ v.T, (turned * values) @ v.T
    np.testing.assert_allclose(closest_cosines(w, tuned, 3), [1, 0.6, 1])
    assert [intruder_dimensions(w, tuned, 3, epsilon) for epsilon in (0.5, 0.59, 0.61, 0.9)] == [0, 0, 1, 1]
    assert intruder_dimensions(w, tuned, k=1, epsilon=0.9) == 0


# -- magnitude and direction -------------------------------------------------------------------------------------------


@each_dtype
def test_rows_that_grow_and_rows_that_turn(dtype):
    w = np.array([[2.0, 0, 0], [0, 3.0, 0]], dtype)
    assert row_changes(w, w) == (0, 0)
    assert row_changes(w, 1.5 * w) == pytest.approx((1.25, 0))
    assert row_changes(w, np.array([[1.0, 0, 0], [0, 0, -6.0]], dtype)) == pytest.approx(((1 + 3) / 2, 0.5))
    small = np.array([[1.0, 0.0]], np.float32), np.array([[1.0, 1e-5]], np.float32)
    assert row_changes(*small)[1] == pytest.approx(0.5e-10, rel=1e-3)  # not lost in rounding


# -- invalid arguments -------------------------------------------------------------------------------------------------

EYE, ONES, WIDE = np.eye(4), np.ones((4, 4)), np.ones((4, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: svd(np.ones(3)), r"must be a matrix with rows and columns, got shape \(3,\)"),
        (lambda: svd(np.ones((0, 3))), "rows and columns"),
        (lambda: svd(np.full((2, 2), np.nan)), "NaN or infinity"),
        (lambda: singular_values(np.full((2, 2), np.inf)), "NaN or infinity"),
        (lambda: svd((ONES, ONES, ONES)), r"a pair \(B, A\), got 3"),
        (lambda: svd((np.ones((4, 2)), np.ones((3, 4)))), "no product"),
        (lambda: rank_for_variance(np.zeros(3)), "all singular values are zero"),
        (lambda: rank_for_variance(np.array([1.0, -1.0])), "none of them negative"),
        (lambda: rank_for_variance(np.array([1.0, np.nan])), "finite"),
        (lambda: rank_for_variance(ONES), "a list of finite numbers"),
        (lambda: rank_for_variance(np.ones(3), 0), "share must be above 0 and at most 1, got 0"),
        (lambda: rank_for_variance(np.ones(3), 1.5), "got 1.5"),
        (lambda: subspace_similarities(EYE, WIDE), "have 4 and 5 inputs"),
        (lambda: subspace_similarities(EYE, np.zeros((4, 4))), "the update is zero"),
        (lambda: chance_similarity(1, 5, 4), "between 1 and the 4 dimensions"),
        (lambda: chance_similarity(0, 1, 4), "between 1 and the 4 dimensions"),
        (lambda: amplification(np.zeros((4, 4)), EYE), "the update is zero"),
        (lambda: amplification(EYE, WIDE), "the update is 4 x 4 and W is 4 x 5"),
        (lambda: amplification(EYE, EYE, r=5), "between 1 and the update's rank 4, got 5"),
        (lambda: amplification(ONES, EYE, r=2), "rank 1, got 2"),
        (lambda: amplification(np.diag([1.0, 0]), np.diag([0, 1.0])), "W is zero in the directions"),
        (lambda: intruder_dimensions(EYE, EYE, k=5), "k must be between 1 and 4"),
        (lambda: intruder_dimensions(EYE, EYE, k=0), "k must be between 1 and 4"),
        (lambda: intruder_dimensions(EYE, WIDE, k=2), "must have the same shape"),
        (lambda: intruder_dimensions(EYE, EYE, k=2, epsilon=0), "epsilon must be above 0"),
        (lambda: intruder_dimensions(EYE, EYE, k=2, epsilon=1.1), "epsilon must be above 0"),
        (lambda: row_changes(EYE, WIDE), "must have the same shape"),
        (lambda: row_changes(np.zeros((4, 4)), EYE), "a row of zeros"),
    ],
)
def test_invalid_arguments_are_refused_in_a_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
