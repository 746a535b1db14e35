"""Laws of low rank: Eckart-Young, measures of rank, subspaces, counts, and training in a random subspace."""

import math
from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
from helpers.studies import load_study
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file
from torch import nn

from lorakit.experiments.records import frame, read_records
from lorakit.layers import lowrank
from lorakit.layers.subspace import RandomSubspace

RECORD = Path(__file__).resolve().parents[2] / "data" / "lowrank"
settings.register_profile("patient", deadline=None)  # the first SVD of a process is slow
settings.load_profile("patient")
SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**16)
SPECTRA = st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(lambda values: max(values) > 1e-6)


def spectrum(values):
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def matrices(draw):
    """A matrix and a rank that it can be cut to."""
    torch.manual_seed(draw(SEEDS))
    matrix = torch.randn(draw(SIZES), draw(SIZES), dtype=torch.float64)
    return matrix, draw(st.integers(1, min(matrix.shape)))


# ---- one matrix ----


@given(matrices())
def test_the_best_approximation_misses_exactly_the_tail(case):
    matrix, k = case
    values = torch.linalg.svdvals(matrix)
    U, S, Vh = lowrank.truncated_svd(matrix, k)
    missed = matrix - U * S @ Vh
    tail = torch.cat([values[k:], torch.zeros(1)])
    assert math.isclose(missed.norm(), tail.norm(), abs_tol=1e-9)
    assert math.isclose(torch.linalg.matrix_norm(missed, 2), tail.max(), abs_tol=1e-9)
    torch.testing.assert_close(U.T @ U, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(k, dtype=torch.float64))


@given(matrices(), SEEDS)
def test_no_other_matrix_of_that_rank_is_nearer(case, seed):
    matrix, k = case
    torch.manual_seed(seed)
    U, S, Vh = lowrank.truncated_svd(matrix, k)
    B, A = U * S + 0.1 * torch.randn_like(U), Vh + 0.1 * torch.randn_like(Vh)
    for order in ("fro", 2):
        best = torch.linalg.matrix_norm(matrix - U * S @ Vh, order)
        assert torch.linalg.matrix_norm(matrix - B @ A, order) >= best - 1e-9


def test_half_precision_is_computed_in_float32_and_gradients_stay_out():
    U, _, _ = lowrank.truncated_svd(torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True), 2)
    assert U.dtype == torch.float32
    assert not U.requires_grad


@pytest.mark.parametrize("k", [0, 4, -1])
def test_a_rank_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match="from 1 to 3"):
        lowrank.truncated_svd(torch.randn(4, 3), k)


def test_a_matrix_with_nan_is_refused():
    with pytest.raises(ValueError, match="finite"):
        lowrank.truncated_svd(torch.full((2, 2), math.nan), 1)


@given(matrices())
def test_energy_is_one_minus_the_squared_relative_error(case):
    matrix, k = case
    U, S, Vh = lowrank.truncated_svd(matrix, k)
    error = (matrix - U * S @ Vh).norm() / matrix.norm()
    assert math.isclose(lowrank.captured_energy(torch.linalg.svdvals(matrix), k), 1 - error**2, abs_tol=1e-9)


@given(SPECTRA)
def test_energy_rises_from_zero_to_one_in_shrinking_steps(values):
    shares = [lowrank.captured_energy(spectrum(values), k) for k in range(len(values) + 1)]
    steps = [b - a for a, b in pairwise(shares)]
    assert shares[0] == 0
    assert math.isclose(shares[-1], 1)
    assert all(a >= b - 1e-12 for a, b in pairwise(steps))
    assert min(steps) >= -1e-12


@given(SPECTRA)
def test_one_is_below_stable_below_effective_below_algebraic_rank(values):
    stable, effective = lowrank.stable_rank(spectrum(values)), lowrank.effective_rank(spectrum(values))
    assert 1 - 1e-9 <= stable <= effective * (1 + 1e-9)
    assert effective <= sum(value > 0 for value in values) * (1 + 1e-9)


@given(SPECTRA, st.floats(1e-3, 1e3))
def test_measures_of_rank_ignore_the_scale_and_the_order(values, factor):
    for measure in (lowrank.stable_rank, lowrank.effective_rank):
        other = measure(factor * spectrum(values).flip(0))
        assert math.isclose(measure(spectrum(values)), other, rel_tol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_equal_values_have_full_rank_in_every_measure(n):
    assert math.isclose(lowrank.effective_rank(torch.ones(n)), n, rel_tol=1e-9)
    assert math.isclose(lowrank.stable_rank(torch.ones(n)), n, rel_tol=1e-9)


def test_effective_rank_of_a_known_spectrum():
    expected = math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))  # p = (3/4, 1/4)
    assert math.isclose(lowrank.effective_rank(spectrum([3.0, 1.0])), expected)
    assert math.isclose(lowrank.stable_rank(spectrum([3.0, 1.0])), 10 / 9)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [1.0, -1.0], [1.0, math.nan], [math.inf]])
def test_what_is_no_spectrum_is_refused(values):
    for measure in (lowrank.effective_rank, lowrank.stable_rank, lambda s: lowrank.captured_energy(s, 0)):
        with pytest.raises(ValueError, match="singular values"):
            measure(torch.tensor(values))


# ---- counting ----


@given(SIZES, SIZES, st.integers(1, 30))
def test_lora_is_smaller_exactly_below_the_break_even_rank(d_out, d_in, rank):
    smaller = lowrank.lora_parameters(d_out, d_in, rank) < d_out * d_in
    assume(rank != lowrank.break_even_rank(d_out, d_in))
    assert smaller == (rank < lowrank.break_even_rank(d_out, d_in))


def test_counts_of_known_layers():
    assert lowrank.lora_parameters(4096, 4096, 16) == 131_072
    assert lowrank.break_even_rank(4096, 4096) == 2048
    with pytest.raises(ValueError, match="rank >= 1"):
        lowrank.lora_parameters(4, 4, 0)


# ---- two matrices ----


@given(matrices(), SEEDS)
def test_similarity_is_one_for_a_subspace_of_itself_whatever_the_basis(case, seed):
    A, _ = case
    n = min(A.shape)
    torch.manual_seed(seed)
    mixed = torch.linalg.qr(torch.randn(len(A), len(A), dtype=A.dtype)).Q @ A  # other rows, the same row space
    assert math.isclose(lowrank.subspace_similarity(A, mixed, n, n), 1, abs_tol=1e-9)
    assert math.isclose(lowrank.subspace_similarity(A, A, 1, n), 1, abs_tol=1e-9)


@given(matrices(), SEEDS)
def test_similarity_is_symmetric_between_zero_and_one_and_the_formula(case, seed):
    A, k = case
    torch.manual_seed(seed)
    B = torch.randn(5, A.shape[1], dtype=A.dtype)
    j = min(B.shape)
    similarity = lowrank.subspace_similarity(A, B, k, j)
    assert 0 <= similarity <= 1 + 1e-9
    assert math.isclose(similarity, lowrank.subspace_similarity(B, A, j, k), abs_tol=1e-9)
    Ua, Ub = lowrank.truncated_svd(A, k)[2].T, lowrank.truncated_svd(B, 1)[2].T
    assert math.isclose(lowrank.subspace_similarity(A, B, k, 1), (Ua.T @ Ub).norm() ** 2, abs_tol=1e-9)


def test_orthogonal_rows_have_nothing_in_common():
    assert lowrank.subspace_similarity(torch.eye(6)[:2], torch.eye(6)[2:], 2, 4) == 0


@pytest.mark.parametrize(("i", "j"), [(1, 1), (2, 8), (8, 8)])
def test_random_subspaces_overlap_as_expected(i, j):
    torch.manual_seed(0)
    pairs = [(torch.randn(8, 40), torch.randn(8, 40)) for _ in range(300)]
    mean = sum(lowrank.subspace_similarity(A, B, i, j) for A, B in pairs) / len(pairs)
    assert math.isclose(mean, lowrank.random_similarity(i, j, 40), rel_tol=0.15)


def test_similarity_refuses_more_directions_than_there_are():
    with pytest.raises(ValueError, match="from 1 to 2"):
        lowrank.subspace_similarity(torch.randn(2, 5), torch.randn(3, 5), 3, 3)
    with pytest.raises(ValueError, match="from 1 to 5"):
        lowrank.random_similarity(6, 1, 5)


def test_amplification_tells_new_directions_from_old():
    weight = torch.diag(torch.tensor([10.0, 1.0, 0.1]))
    new, old = torch.zeros(3, 3), torch.zeros(3, 3)
    new[2, 2], old[0, 0] = 2.0, 2.0
    assert math.isclose(lowrank.amplification(weight, new, 1), 20, rel_tol=1e-5)
    assert math.isclose(lowrank.amplification(weight, old, 1), 0.2, rel_tol=1e-5)
    with pytest.raises(ValueError, match="not zero"):
        lowrank.amplification(torch.zeros(3, 3), new, 1)


# ---- training in a random subspace ----


def small_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7, bias=False), nn.Linear(7, 3))
    model[2].requires_grad_(False)
    return model


def projection(subspace):
    """P as a dense matrix (D, d), column by column."""
    columns = []
    for unit in torch.eye(len(subspace.z)):
        subspace.z.data.copy_(unit)
        moved = subspace.theta()
        origin = [subspace.model.get_parameter(name) for name in moved]
        pairs = zip(moved.values(), origin, strict=True)
        columns.append(torch.cat([(new - old).detach().flatten() for new, old in pairs]))
    subspace.z.data.zero_()
    return torch.stack(columns, 1)


@given(st.integers(1, 66), SEEDS)
def test_the_projection_is_an_isometry(dimension, seed):
    P = projection(RandomSubspace(small_model(), dimension, seed))
    assert P.shape == (66, dimension)
    torch.testing.assert_close(P.T @ P, torch.eye(dimension))
    assert (P != 0).sum(1).eq(1).all()


def test_a_random_subspace_holds_its_share_of_any_vector():
    vector = torch.randn(66, generator=torch.Generator().manual_seed(0))
    shares = [
        (projection(RandomSubspace(small_model(), 11, seed)).T @ vector).norm() ** 2 / vector.norm() ** 2
        for seed in range(200)
    ]
    assert math.isclose(sum(shares) / len(shares), 11 / 66, rel_tol=0.1)


def test_seeds_make_the_projection_and_nothing_else():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = small_model()
    torch.set_rng_state(state)
    P, same, other = (projection(RandomSubspace(model.requires_grad_(True), 9, seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(P, same)
    assert not torch.equal(P, other)


def test_it_starts_at_the_model_and_its_gradient_is_the_full_one_projected():
    model, x = small_model(), torch.randn(4, 5)
    expected = model(x)
    expected.square().sum().backward()
    full = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    subspace = RandomSubspace(model, 10)
    assert torch.equal(subspace(x), expected)
    subspace(x).square().sum().backward()
    P = projection(subspace)
    torch.testing.assert_close(subspace.z.grad, P.T @ full)
    assert [name for name, p in subspace.named_parameters() if p.requires_grad] == ["z"]


def test_written_back_it_is_a_plain_model_with_the_same_outputs():
    model, x = small_model(), torch.randn(4, 5)
    trainable = [p.requires_grad for p in model.parameters()]
    subspace = RandomSubspace(model, 20)
    nn.init.normal_(subspace.z)
    expected = subspace(x)
    plain = subspace.write_back()
    assert plain is model
    assert torch.equal(plain(x), expected)
    assert torch.equal(subspace(x), expected)
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_removed_it_leaves_the_model_as_it_was():
    model, x = small_model(), torch.randn(4, 5)
    before, trainable = model(x), [p.requires_grad for p in model.parameters()]
    subspace = RandomSubspace(model, 20)
    nn.init.normal_(subspace.z)
    assert torch.equal(subspace.remove()(x), before)
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_a_weight_with_two_names_moves_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    model, x = Tied(), torch.randn(2, 4)
    subspace = RandomSubspace(model, 5)
    nn.init.normal_(subspace.z)
    assert len(subspace.buckets) == 16
    expected = subspace(x)
    torch.testing.assert_close(subspace.write_back()(x), expected)
    assert model.a.weight is model.b.weight


@pytest.mark.parametrize("dimension", [0, 67])
def test_a_dimension_out_of_range_is_refused_and_freezes_nothing(dimension):
    model = small_model()
    with pytest.raises(ValueError, match="from 1 to 66"):
        RandomSubspace(model, dimension)
    assert model[0].weight.requires_grad


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="require a gradient"):
        RandomSubspace(small_model().requires_grad_(False), 3)


# ---- the record that lesson 01 reads ----


def test_the_recorded_similarities_are_those_of_the_stored_matrices():
    stored = load_file(RECORD / "adapters.safetensors")
    layer = "model.layers.15.self_attn.q_proj"
    pairs = read_records(RECORD / "pairs")
    for pair in pairs:
        arms = pair["settings"]["left"], pair["settings"]["right"]
        for letter, recorded in pair["result"]["one layer"].items():
            a, b = (stored[f"{arm}/{layer}/{letter}"] for arm in arms)
            a, b = (a, b) if letter == "A" else (a.T, b.T)
            assert math.isclose(lowrank.subspace_similarity(a, b, 8, 8), recorded, abs_tol=1e-4)
    assert len(pairs) == 3
    assert frame(RECORD / "trainings")["rank"].tolist() == [8, 64, 64]


def test_each_recorded_optimiser_learnt_as_much_at_a_rate_with_neighbours_on_both_sides():
    study = load_study("lowrank")
    repeats = frame(RECORD / "optimizers", study.repeats(frame(RECORD / "optimizers", study.tuning())))
    assert len(repeats) == len(study.RATES) * len(study.SEEDS)
    assert repeats.steps_made.max() < study.FULL["steps"], "a run ended before its loss was low"
    for name, rate in repeats.groupby("optimizer").lr.unique().items():
        assert rate in study.RATES[name][1:-1]


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(20, 12, 4), (12, 20, 4), (6, 9, 11)])
def test_a_products_singular_values_come_from_its_factors(d_out, d_in, rank):
    torch.manual_seed(0)
    B, A = torch.randn(d_out, rank), torch.randn(rank, d_in)
    values = lowrank.factored_singular_values(B, A)
    wanted = torch.linalg.svdvals(B.double() @ A.double())
    torch.testing.assert_close(values, wanted[: len(values)])
    assert (wanted[len(values) :] < 1e-12).all()


@pytest.mark.parametrize(("d_out", "d_in"), [(40, 30), (30, 40)])
def test_an_intruder_is_like_no_singular_vector_of_the_weight(d_out, d_in):
    torch.manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(d_out, d_in), full_matrices=False)
    W = U @ torch.diag(1.5 ** -torch.arange(30.0)) @ V
    new = U.sum(1, keepdim=True) / 30**0.5  # its cosine with each of W's is 0.18
    assert lowrank.count_intruders(W, torch.zeros_like(W)) == 0
    assert lowrank.count_intruders(W, 50 * U[:, 3:4] @ V[3:4]) == 0, "one of W's own is no intruder, however large"
    assert lowrank.count_intruders(W, 50 * new @ V[3:4], k=5) == 1
    assert lowrank.count_intruders(W, 50 * new @ V[3:4], k=5, epsilon=0.1) == 0
    assert lowrank.count_intruders(torch.zeros_like(W), new @ V[3:4], k=1) == 1
    for k, epsilon in ((0, 0.5), (10, 0.0), (10, 1.5)):
        with pytest.raises(ValueError, match="expected k >= 1 and epsilon"):
            lowrank.count_intruders(W, W, k, epsilon)


@pytest.mark.parametrize(("d_out", "d_in"), [(40, 30), (30, 40)])
def test_an_intruder_that_is_lowered_keeps_its_share_and_leaves_the_rest(d_out, d_in):
    torch.manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(d_out, d_in).double(), full_matrices=False)
    W = U @ torch.diag(1.5 ** -torch.arange(30.0).double()) @ V
    delta = 50 * U.sum(1, keepdim=True) / 30**0.5 @ V[3:4] + 0.01 * U[:, :1] @ V[:1]
    left, values, right = torch.linalg.svd(W + delta, full_matrices=False)
    lowered = values.clone()
    lowered[0] *= 0.6
    wanted = left @ torch.diag(lowered) @ right - W
    assert lowrank.count_intruders(W, delta, k=1) == 1
    torch.testing.assert_close(lowrank.lower_intruders(W, delta, 0.6, k=1), wanted)
    torch.testing.assert_close(lowrank.lower_intruders(W, delta, 1.0, k=1), delta)
    plain = 3 * U[:, :1] @ V[:1]  # one of W's own
    torch.testing.assert_close(lowrank.lower_intruders(W, plain), plain)
    assert lowrank.lower_intruders(W.float(), delta.float(), k=1).dtype == torch.float32
    with pytest.raises(ValueError, match=r"expected share in \[0, 1\], got 1.5"):
        lowrank.lower_intruders(W, delta, 1.5)


def test_intruders_are_lowered_as_peft_does_before_it_cuts_to_the_rank():
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(30, 40, bias=False)), peft.LoraConfig(r=8, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=3)
    W, delta = layer.get_base_layer().weight.detach(), layer.get_delta_weight("default").detach()
    found = lowrank.lower_intruders(W, delta, 0.75)
    reduce_intruder_dimension(model, mitigation_lambda=0.75, logging_sink=None)
    U, S, V = lowrank.truncated_svd(found, 8)
    torch.testing.assert_close(layer.get_delta_weight("intruder_reduced"), U @ torch.diag(S) @ V, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, delta, atol=0.1)
