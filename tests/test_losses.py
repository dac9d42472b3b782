"""CPSD and NT-Xent against closed values, symmetries and slow references with explicit loops."""
import cmath
import math
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F

from losses import circle_point, cpsd, nt_xent


def one_hot(*classes):
    """Views of a batch of one: (views, 1, 12)."""
    return F.one_hot(torch.tensor(classes) % 12, 12).float()[:, None]


def shifts_of(*shifts):
    return torch.tensor(shifts)[:, None]


def random_case(views=3, batch=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    profiles = (2 * torch.randn(views, batch, 12, generator=generator)).softmax(-1)
    return profiles, torch.randint(-12, 13, (views, batch), generator=generator)


# ---------------------------------------------------------------- CPSD


@pytest.mark.parametrize("omega", [1, 5, 7])
def test_cpsd_is_zero_for_one_hots_that_turn_with_the_music(omega):
    for base, shift in product(range(12), range(-12, 13)):
        assert cpsd(one_hot(base + shift, base), shifts_of(shift, 0), omega).item() < 1e-9


def test_cpsd_is_four_for_opposite_points_and_one_for_uniform_profiles():
    assert cpsd(one_hot(6, 0), shifts_of(0, 0)).item() == pytest.approx(4, abs=1e-5)
    uniform = torch.full((2, 3, 12), 1 / 12)
    for shift in range(12):
        assert cpsd(uniform, torch.tensor([[shift] * 3, [0] * 3])).item() == pytest.approx(1, abs=1e-5)


def test_cpsd_is_sensitive_to_the_sign_of_a_shift():
    """Shifts of 0 and 6 cannot tell the sign, a shift of 1 can: the points end up 60 degrees apart."""
    assert cpsd(one_hot(4, 3), shifts_of(1, 0)).item() < 1e-9
    assert cpsd(one_hot(2, 3), shifts_of(1, 0)).item() == pytest.approx(abs(1 - cmath.exp(1j * math.pi / 3)) ** 2, abs=1e-5)


def test_cpsd_depends_on_the_difference_of_shifts_only():
    profiles, shifts = random_case()
    assert cpsd(profiles, shifts + 5).item() == pytest.approx(cpsd(profiles, shifts).item(), abs=1e-5)
    assert cpsd(profiles, shifts - 12).item() == pytest.approx(cpsd(profiles, shifts).item(), abs=1e-5)


def test_cpsd_ignores_a_common_rotation_of_all_profiles():
    profiles, shifts = random_case()
    for rotation in range(12):
        assert cpsd(profiles.roll(rotation, -1), shifts).item() == pytest.approx(cpsd(profiles, shifts).item(), abs=1e-5)
    assert abs(cpsd(profiles.roll(1, -1) * torch.tensor([1, 0, 0])[:, None, None], shifts) - cpsd(profiles, shifts)) > 1e-3


def test_cpsd_is_symmetric_under_swapping_the_views():
    """Order and shifts swapped together change nothing; swapping the views with their shift negated is the same."""
    profiles, shifts = random_case(views=2)
    value = cpsd(profiles, shifts).item()
    assert cpsd(profiles.flip(0), shifts.flip(0)).item() == pytest.approx(value, abs=1e-6)
    relative = shifts[0] - shifts[1]
    zero = torch.zeros_like(relative)
    assert cpsd(profiles.flip(0), torch.stack([-relative, zero])).item() == pytest.approx(value, abs=1e-5)
    assert abs(cpsd(profiles.flip(0), torch.stack([relative, zero])).item() - value) > 1e-3


@pytest.mark.parametrize("views, omega", list(product([2, 3], [1, 5, 7])))
def test_cpsd_equals_the_complex_definition(views, omega):
    profiles, shifts = random_case(views)
    terms = []
    for a, b in combinations(range(views), 2):
        for i in range(profiles.shape[1]):
            z = [sum(profiles[v, i, q].item() * cmath.exp(2j * math.pi * omega * q / 12) for q in range(12)) for v in (a, b)]
            turn = cmath.exp(2j * math.pi * omega * (shifts[a, i] - shifts[b, i]).item() / 12)
            terms.append(abs(turn - z[0] * z[1].conjugate()) ** 2)
    assert cpsd(profiles, shifts, omega).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_cpsd_takes_the_pairs_it_is_given():
    profiles, shifts = random_case()
    single = {(a, b): cpsd(profiles[[a, b]], shifts[[a, b]]).item() for a, b in combinations(range(3), 2)}
    assert cpsd(profiles, shifts, pairs=[(0, 2)]).item() == pytest.approx(single[0, 2], rel=1e-5)
    assert cpsd(profiles, shifts, pairs=[(0, 2), (1, 2)]).item() == pytest.approx((single[0, 2] + single[1, 2]) / 2, rel=1e-5)
    assert cpsd(profiles, shifts).item() == pytest.approx(sum(single.values()) / 3, rel=1e-5)


def test_a_fifth_up_turns_the_point_by_30_degrees_at_omega_7():
    """A wrong omega would agree with itself; this pins the circle of fifths."""
    for q in range(12):
        re, im = circle_point(one_hot(q, q + 7)[:, 0], 7)
        before, after = (complex(x, y) for x, y in zip(re.tolist(), im.tolist()))
        assert abs(after / before - cmath.exp(1j * math.pi / 6)) < 1e-5


def test_cpsd_gradient_is_finite_and_a_step_against_it_helps():
    profiles, shifts = random_case()
    logits = profiles.log().requires_grad_()
    loss = cpsd(logits.softmax(-1), shifts)
    loss.backward()
    assert logits.grad.isfinite().all() and logits.grad.norm() > 1e-4
    assert cpsd((logits - 0.1 * logits.grad).softmax(-1), shifts) < loss
    for profile in (torch.full((3, 5, 12), 1 / 12), torch.eye(12)[:5].expand(3, 5, 12)):
        leaf = profile.clone().requires_grad_()
        cpsd(leaf, shifts).backward()
        assert leaf.grad.isfinite().all()


def test_the_same_pitch_pair_rewards_a_constant_output():
    """The trap: over all three pairs a constant beats a uniform output; over the transposed pairs alone it never does."""
    target = 3 ** -0.5                                         # one-hot mixed with uniform: |z| = weight of the one-hot
    constant = target * one_hot(0, 0, 0).expand(3, 12, 12) + (1 - target) / 12
    assert circle_point(constant, 7)[0].square()[0, 0].item() == pytest.approx(1 / 3, abs=1e-5)
    shifts = torch.stack([torch.zeros(12), torch.zeros(12), torch.arange(12.0)]).long()    # views 0, 1 at the same pitch
    assert 3 * cpsd(constant, shifts).item() == pytest.approx(8 / 3, abs=1e-4)
    assert cpsd(constant, shifts, pairs=[(0, 2), (1, 2)]).item() == pytest.approx(1 + 1 / 9, abs=1e-4)


def test_a_constant_output_is_never_better_than_uniform_over_transposed_pairs():
    """Two different crops out of 0..12: a constant scores 1 + 2/13 |z|^2 + |z|^4, more than the 1 of a uniform output."""
    crops = torch.tensor([(a, b) for a in range(13) for b in range(13) if a != b]).T          # (2, 156)
    for weight in (0.25, 0.5, 1.0):
        constant = weight * one_hot(3, 3).expand(2, 156, 12) + (1 - weight) / 12
        expected = 1 + 2 / 13 * weight ** 2 + weight ** 4
        assert cpsd(constant, -crops).item() == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------- NT-Xent


def slow_nt_xent(z, tracks, temperature):
    rows = list(product(range(z.shape[0]), range(z.shape[1])))                              # (view, item)
    weight = lambda a, b: math.exp(F.cosine_similarity(z[a], z[b], dim=0).item() / temperature)
    losses = []
    for anchor in rows:
        positives = [other for other in rows if other != anchor and other[1] == anchor[1]]
        negatives = [other for other in rows if tracks[other[1]] != tracks[anchor[1]]]
        total = sum(weight(anchor, other) for other in positives + negatives)
        losses += [-math.log(weight(anchor, other) / total) for other in positives]
    return sum(losses) / len(losses)


def embeddings(views=2, batch=6, dim=9, seed=0, noise=0.5):
    """Views of the same items, some noise apart: (views, batch, dim), batch and dim different on purpose."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, batch, dim, generator=generator) + noise * torch.randn(views, batch, dim, generator=generator)


@pytest.mark.parametrize("shape", [(2, 4, 7), (2, 7, 4), (2, 16, 3), (3, 5, 8)])
def test_nt_xent_is_log_of_the_candidates_when_all_embeddings_coincide(shape):
    views, batch, _ = shape
    assert nt_xent(torch.ones(shape)).item() == pytest.approx(math.log(views * batch - 1), abs=1e-5)


def test_nt_xent_of_a_single_pair_is_zero():
    """With the diagonal left in it would not be."""
    assert nt_xent(embeddings(batch=1)).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("views, batch, dim, temperature", [(2, 5, 8, 0.1), (2, 8, 5, 0.5), (3, 4, 6, 0.1), (4, 3, 3, 1.0)])
def test_nt_xent_equals_an_explicit_loop(views, batch, dim, temperature):
    z = embeddings(views, batch, dim).double()
    assert nt_xent(z, temperature=temperature).item() == pytest.approx(slow_nt_xent(z, range(batch), temperature), rel=1e-4)


@pytest.mark.parametrize("views, tracks", [(2, [0, 0, 1, 2, 2, 2]), (3, [5, 7, 5, 9]), (2, [3, 3, 3])])
def test_nt_xent_masks_other_items_of_the_same_track(views, tracks):
    """They are neither positives nor negatives; with a single track, the positives alone are left."""
    z, tracks = embeddings(views, len(tracks), 8).requires_grad_(), torch.tensor(tracks)
    loss = nt_xent(z, tracks)
    assert loss.item() == pytest.approx(slow_nt_xent(z.detach().double(), tracks.tolist(), 0.1), rel=1e-4)
    loss.backward()
    assert z.grad.isfinite().all()


def test_pieces_of_one_track_that_sound_alike_are_not_pushed_apart():
    z, tracks = embeddings(batch=4, noise=0.0), torch.tensor([0, 0, 1, 2])
    z[:, 1] = z[:, 0]                                                                       # two pieces that are alike
    assert nt_xent(z, tracks) < nt_xent(z) - 0.2


def test_nt_xent_ignores_length_order_of_items_and_order_of_views():
    z = embeddings()
    value = nt_xent(z).item()
    scaled = z.clone()
    scaled[1, 2] *= 37.0
    assert nt_xent(scaled).item() == pytest.approx(value, rel=1e-5)
    assert nt_xent(z[:, torch.randperm(6)]).item() == pytest.approx(value, rel=1e-5)
    assert nt_xent(z.flip(0)).item() == pytest.approx(value, rel=1e-5)


def test_nt_xent_rises_when_pairs_are_broken():
    z = embeddings(noise=0.1)
    assert nt_xent(torch.stack([z[0], z[1].roll(1, 0)])) > nt_xent(z) + 1


def test_nt_xent_is_finite_at_a_low_temperature_and_for_a_zero_row():
    z = embeddings()
    z[0, 0] = 0
    z.requires_grad_()
    loss = nt_xent(z, temperature=0.01)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["nt_xent", "cpsd"])
def test_losses_are_float32_under_bf16_autocast(loss):
    z = embeddings(batch=32, noise=0.05)
    profiles, shifts = random_case(batch=32)
    compute = {"nt_xent": lambda: nt_xent(z), "cpsd": lambda: cpsd(profiles, shifts)}[loss]
    expected = compute().item()
    with torch.autocast("cpu", torch.bfloat16):
        result = compute()
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(expected, rel=1e-6)
