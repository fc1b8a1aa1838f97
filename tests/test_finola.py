"""FINOLA: the recursion, its masked forms, curvature and differential equations, the embedding space, the method."""

import copy
import itertools
import math
import re

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from make import generator, images_of, rand, randn, seeds, shapes, tiny_finola

import common
import finola
from finola import Config, Finola, MFDecoder
from plumbing.errors import UserError
from plumbing.probes import labelled
from plumbing.run_files import identity_of
from plumbing.settings import read_flags

VARIANTS = ("finola", "masked_e", "masked_b")
sides = st.integers(1, 5)


def random_finola(dim, seed=0, scale=1.0, kind=Finola):
    """A Finola in float64 with random matrices."""
    module = kind(dim).double()
    for i, name in enumerate(finola.DIRECTIONS):
        getattr(module, name).data = scale * randn(dim, dim, seed=seed + i)
    return module


def matrices(module):
    return {name: getattr(module, name).detach() for name in finola.DIRECTIONS}


# --- the recursion ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(2, 6), sides, sides, st.integers(0, 24), seeds)
def test_the_parallel_map_is_the_mean_of_both_walks_to_each_cell(batch, dim, height, width, place, seed):
    """Fig. 3 against walking to each cell anew by Eq. 1; on the axes through q both walks are one."""
    module, q = random_finola(dim, seed), randn(batch, dim, seed=seed)
    origin = (place % height, place // 5 % width)
    walks = reference.finola_walks(q, matrices(module), (height, width), origin)
    found = module(q, (height, width), origin)
    torch.testing.assert_close(found, walks.mean(dim=0))
    torch.testing.assert_close(found[:, :, origin[0]], walks[0, :, :, origin[0]])
    torch.testing.assert_close(found[..., origin[1]], walks[1, ..., origin[1]])
    torch.testing.assert_close(found[:, :, origin[0], origin[1]], q)


@pytest.mark.parametrize("size", [4, 5, (4, 7)])
def test_the_origin_is_the_centre_unless_given(size):
    """z(16 / 2, 16 / 2) = q, counted from 0 (section 1)."""
    module, q = random_finola(3), randn(2, 3)
    height, width = (size, size) if isinstance(size, int) else size
    torch.testing.assert_close(module(q, size), module(q, size, (height // 2, width // 2)))
    torch.testing.assert_close(module(q, size)[:, :, height // 2, width // 2], q)


NORMS = {
    "channel": Finola,
    "running": lambda dim: finola.AveragedFinola(dim, "running"),
    "batch": lambda dim: finola.AveragedFinola(dim, "batch"),
}


def swapped(module, pairs):
    other = copy.deepcopy(module)
    for name, source in pairs.items():
        getattr(other, name).data = getattr(module, source).data
    return other


@given(st.integers(2, 5), sides, sides, st.sampled_from(list(NORMS)), seeds)
def test_transposing_or_mirroring_the_map_swaps_the_matrices(dim, height, width, norm, seed):
    """Fig. 3 averages both orders, so that no axis comes first; nor with moving averages, taken and then used."""
    module, q, origin = random_finola(dim, seed, kind=NORMS[norm]), randn(3, dim, seed=seed), (height // 2, width // 2)
    turned = swapped(module, {"right": "down", "left": "up", "down": "right", "up": "left"})
    mirrored = swapped(module, {"right": "left", "left": "right", "down": "down", "up": "up"})
    flipped = swapped(module, {"right": "right", "left": "left", "down": "up", "up": "down"})
    for training in (True, False):
        found = module.train(training)(q, (height, width), origin)
        other = turned.train(training)(q, (width, height), origin[::-1])
        torch.testing.assert_close(other, found.transpose(2, 3))
        other = mirrored.train(training)(q, (height, width), (origin[0], width - 1 - origin[1]))
        torch.testing.assert_close(other, found.flip(3))
        other = flipped.train(training)(q, (height, width), (height - 1 - origin[0], origin[1]))
        torch.testing.assert_close(other, found.flip(2))


def test_zero_matrices_give_a_constant_map():
    """Eq. 1 with A = B = 0."""
    q = randn(2, 4)
    torch.testing.assert_close(random_finola(4, scale=0.0)(q, 5), q[:, :, None, None].expand(-1, -1, 5, 5))


@given(st.integers(3, 6), st.floats(-5, 5), st.floats(0.5, 4), seeds)
def test_shift_and_scale_of_q_pass_through_the_norm(dim, shift, scale, seed):
    """Eq. 1: z_n forgets a constant over channels and a factor. Steps stay the same, so the map moves with q."""
    module, q = random_finola(dim, seed), 1000 * randn(2, dim, seed=seed)  # so that eps does not count
    torch.testing.assert_close(module(q + shift, 4), module(q, 4) + shift)
    wider = random_finola(dim, seed, scale)
    torch.testing.assert_close(wider(scale * q, 4), scale * module(q, 4), rtol=1e-4, atol=1e-4)


@given(st.integers(2, 6), seeds)
def test_channel_norm_has_mean_0_and_population_deviation_1_along_any_axis(dim, seed):
    """z_n of Eq. 1, with 1e-5 added to the variance."""
    z = randn(2, dim, 3, seed=seed)
    found = finola.channel_norm(z, dim=1)
    expected = (z - z.mean(dim=1, keepdim=True)) / (z.var(dim=1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(finola.channel_norm(z.movedim(1, -1)), expected.movedim(1, -1))
    assert finola.channel_norm(z.to(torch.bfloat16)).dtype == torch.float32


def test_the_map_has_the_right_gradient():
    """Through both orders of Fig. 3, and through the partitions of Fig. 4."""
    module, q = random_finola(3), randn(2, 3).requires_grad_()
    parameters = [getattr(module, name) for name in finola.DIRECTIONS]
    assert torch.autograd.gradcheck(lambda q, *_: module(q, (3, 4)), (q, *parameters))
    block = randn(1, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, *_: module.blockwise(z, 4, 1, 1), (block, *parameters))


def test_states_keep_float32_under_autocast():
    torch.manual_seed(0)
    module, q = Finola(8), randn(2, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(q.bfloat16(), 16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, module(q.bfloat16().float(), 16), rtol=0.1, atol=0.3)


def test_maps_and_places_that_do_not_exist_are_refused():
    module = random_finola(3)
    for origin in ((4, 0), (0, -1)):
        with pytest.raises(ValueError, match="not on a map of 4 x 4"):
            module(randn(1, 3), 4, origin)
    with pytest.raises(ValueError, match="not a quarter"):
        module.blockwise(randn(1, 3, 2, 2), 5, 0, 0)
    for place in ((-1, 0), (0, 3), (torch.tensor([3]), 0)):
        with pytest.raises(ValueError, match="leaves the map"):
            module.blockwise(randn(1, 3, 2, 2), 4, *place)


def test_weights_start_as_documented():
    """A and B as in nn.Linear, uniform between plus and minus 1 / sqrt(C); the query of the pooling is small."""
    method, bound = tiny_finola(channels=256), 256**-0.5
    for name in finola.DIRECTIONS:
        weights = getattr(method.finola, name).detach()
        assert 0.99 * bound < float(weights.abs().max()) <= bound
        assert float(weights.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert float(method.pool.query_token.detach().std()) == pytest.approx(0.02, rel=0.2)
    masked = tiny_finola(variant="masked_e", channels=64).upsampler.linear  # as in MAE: Glorot and Bengio's uniform
    limit = (6 / (64 + 768)) ** 0.5
    assert 0.99 * limit < float(masked.weight.detach().abs().max()) <= limit and not masked.bias.detach().any()
    torch.manual_seed(0)
    queries = MFDecoder((1, 0, 0), 16, 16).queries.detach()
    assert (float(queries.mean()), float(queries.std())) == (pytest.approx(0, abs=0.02), pytest.approx(1, rel=0.02))


@pytest.mark.parametrize("norm", ["running", "batch"])
def test_moving_averages_start_from_mean_0_and_variance_1(norm):
    """As in a batch norm: before any training the map of section 4 is a linear one."""
    module, q = random_finola(4, kind=lambda dim: finola.AveragedFinola(dim, norm)).eval(), randn(2, 4)
    linear = random_finola(4, scale=1 / (1 + 1e-5) ** 0.5, kind=finola.UnnormedFinola)
    torch.testing.assert_close(module(q, 4), linear(q, 4), rtol=1e-6, atol=1e-6)


# --- block-wise ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(2, 4), seeds)
def test_blockwise_matches_the_cell_by_cell_version_at_every_offset(block, dim, seed):
    """Fig. 4, all offsets at once, one an image: visible cells stay, each masked cell is predicted exactly once."""
    module, offsets = random_finola(dim, seed), list(itertools.product(range(block + 1), repeat=2))
    z = randn(len(offsets), dim, block, block, seed=seed)
    rows, columns = torch.tensor(offsets).unbind(1)
    found = module.blockwise(z, 2 * block, rows, columns)
    for image, (row, column) in enumerate(offsets):
        expected, written = reference.blockwise(z[image], matrices(module), row, column)
        assert (written == 1).all()
        torch.testing.assert_close(found[image], expected)
        torch.testing.assert_close(found[image, :, row : row + block, column : column + block], z[image])
    torch.testing.assert_close(
        module.blockwise(z, 2 * block, 0, block),
        module.blockwise(z, 2 * block, *[torch.full((len(z),), place) for place in (0, block)]),
    )


def test_blockwise_geometry_of_the_paper():
    """Fig. 4 on a 16 x 16 map: cell (3, 2) of an upper left block predicts (11, 2), (3, 10) and (11, 10)."""
    module, z = random_finola(2), torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    z[0, :, 3, 2] = torch.tensor([1.0, -1.0])
    moved = module.blockwise(z, 16, 0, 0)[0].abs().sum(dim=0).nonzero().tolist()
    assert moved == [[3, 2], [3, 10], [11, 2], [11, 10]]


def test_the_sketch_of_the_partitions_is_true():
    """Fig. 4 as `blockwise` draws it: each cell has the letter of the visible one, a capital, that predicts it."""
    drawn = re.findall(
        r"^ +([fgjkFGJK] [fgjkFGJK] \| (?:[fgjkFGJK] ?){4})", Finola.blockwise.__doc__, flags=re.MULTILINE
    )
    letters = [re.findall(r"\w", line) for line in drawn]
    sources = finola.block_sources(torch.tensor([1]), 3)[0].tolist()  # 0 to 2 where visible, 3 to 5 where predicted
    for row, column in itertools.product(range(6), repeat=2):
        letter = letters[row][column]
        assert letter.isupper() == (sources[row] < 3 and sources[column] < 3)
        assert letter.upper() == letters[1 + sources[row] % 3][1 + sources[column] % 3]


# --- differential equations and curvature ----------------------------------------------------------------------------


@given(st.integers(2, 4), st.integers(2, 4), st.integers(2, 4), seeds)
def test_pde_residuals_match_the_step_by_step_version(dim, height, width, seed):
    """Eq. 2, of any map."""
    module, z, origin = random_finola(dim, seed), randn(2, dim, height, width, seed=seed), (height // 2, width - 1)
    found = finola.pde_residuals(z, module, origin)
    for image in range(2):
        expected = reference.pde_residual(z[image], matrices(module), origin)
        torch.testing.assert_close(torch.stack([x[image] for x in found]), torch.stack(expected))
    centre = finola.pde_residuals(z, module, (height // 2, width // 2))
    torch.testing.assert_close(finola.pde_residuals(z, module), centre)


def commuting(dim, seed):
    """Skew-symmetric A and B that commute, with zero row sums: rotations of the space orthogonal to (1, ..., 1)."""
    ones = torch.full((dim, 1), dim**-0.5, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, randn(dim, dim - 1, seed=seed)], dim=1)).Q[:, 1:]  # (C, C - 1)
    pairs, found = (dim - 1) // 2, []
    for angles in rand(2, pairs, seed=seed, dtype=torch.float64) + 0.5:
        blocks = torch.block_diag(*[angle * torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double() for angle in angles])
        found.append(basis @ blocks @ basis.T + ones @ ones.T)  # the last part acts on nothing, but makes it invertible
    return found


@given(st.sampled_from((3, 5, 7)), seeds)
@torch.no_grad()
def test_eq_4_holds_where_its_proof_does(dim, seed):
    """The proof of Eq. 4 needs Clairaut's theorem: A D B z_n = B D A z_n, with D the Jacobian of the norm.

    It is true where A and B commute, are skew-symmetric and have zero row sums (they rotate z_n and keep its length).
    Then both orders agree, and the residual of the map goes to zero with the length of its steps: an eighth of the
    length leaves about an eighth. A step is long or short beside the deviation of q, since it turns z_n by its length
    over that: q has deviation 1, so that the longest steps, 0.25, turn it by less than 0.4.
    """
    a, b = commuting(dim, seed)
    q, residuals, orders = randn(1, dim, seed=seed), [], []
    q = q / q.std(correction=0)
    for steps in (1, 2, 4, 8):
        module = random_finola(dim)
        module.right.data, module.down.data = a / steps / 4, b / steps / 4
        z = module(q, 2 * steps + 1, (0, 0))
        residuals.append(float(finola.laplacian_residual(z, a, b)))
        orders.append(float(finola.orders_residual(z, a, b)))
    assert all(later < 0.75 * former + 1e-9 for former, later in itertools.pairwise(orders))
    assert residuals[-1] < 0.25 * residuals[0] + 1e-9
    assert all(later < 0.75 * former + 1e-9 for former, later in itertools.pairwise(residuals))


@torch.no_grad()
def test_eq_4_does_not_hold_for_any_matrices():
    """Eq. 4 for random matrices: the orders disagree, Clairaut's theorem does not apply, small steps do not help."""
    values, orders = [], []
    for steps in (1, 4, 16):
        module = random_finola(6, seed=1)
        a, b = module.right.data.clone(), module.down.data.clone()
        module.right.data, module.down.data = a / steps / 4, b / steps / 4
        z = module(randn(1, 6), 2 * steps + 1, (0, 0))
        values.append(float(finola.laplacian_residual(z, a, b)))
        orders.append(float(finola.orders_residual(z, a, b)))
    assert min(values) > 0.5 and min(orders) > 0.5


def test_laplacian_residual_is_eq_4():
    """Eq. 4, cell by cell, with an inverse written out."""
    z, a, b = randn(2, 3, 4, 5), randn(3, 3, seed=1), randn(3, 3, seed=2)
    square = (a @ torch.linalg.inv(b)) @ (a @ torch.linalg.inv(b))
    for image in range(2):
        sums = torch.zeros(3, dtype=torch.float64)
        for y, x in itertools.product(range(1, 3), range(1, 4)):
            z_xx = z[image, :, y, x + 1] - 2 * z[image, :, y, x] + z[image, :, y, x - 1]
            z_yy = square @ (z[image, :, y + 1, x] - 2 * z[image, :, y, x] + z[image, :, y - 1, x])
            sums += torch.stack([((z_xx - z_yy) ** 2).sum(), (z_xx**2).sum(), (z_yy**2).sum()])
        expected = sums[0].sqrt() / (sums[1].sqrt() + sums[2].sqrt())
        torch.testing.assert_close(finola.laplacian_residual(z, a, b)[image], expected)


def test_orders_residual_is_the_step_of_eq_5_that_needs_clairauts_theorem():
    """z_xy = A (z_n one step down - z_n) beside z_yx = B (z_n one step to the right - z_n), cell by cell."""
    z, a, b = randn(2, 3, 4, 5), randn(3, 3, seed=1), randn(3, 3, seed=2)
    for image, found in zip(z, finola.orders_residual(z, a, b), strict=True):
        sums, z_n = torch.zeros(3, dtype=torch.float64), lambda y, x, cells=image: finola.channel_norm(cells[:, y, x])
        for y, x in itertools.product(range(3), range(4)):
            z_xy, z_yx = a @ (z_n(y + 1, x) - z_n(y, x)), b @ (z_n(y, x + 1) - z_n(y, x))
            sums += torch.stack([((z_xy - z_yx) ** 2).sum(), (z_xy**2).sum(), (z_yx**2).sum()])
        torch.testing.assert_close(found, sums[0].sqrt() / (sums[1].sqrt() + sums[2].sqrt()))


@given(st.integers(3, 6), st.integers(3, 6), seeds)
def test_gaussian_curvature_matches_eq_9_and_turns_with_the_surface(height, width, seed):
    """Eq. 9 at inner cells, cell by cell; no axis and no height of the surface is special."""
    z = randn(2, 3, height, width, seed=seed)
    found = finola.gaussian_curvature(z)
    assert found.shape == z.shape
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(found[i, j, 1:-1, 1:-1], reference.gaussian_curvature(z[i, j]))
    torch.testing.assert_close(finola.gaussian_curvature(z.rot90(1, (2, 3))), found.rot90(1, (2, 3)))
    torch.testing.assert_close(finola.gaussian_curvature(z + 3), found)


def surface(function, side=21, spacing=1.0):
    y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float64) - side // 2] * 2, indexing="ij")
    return function(x * spacing, y * spacing)


def test_curvature_of_surfaces_that_one_knows():
    """Eq. 9 on spheres, saddles, bowls, and on what can be unrolled into a plane."""
    for radius in (30.0, 60.0):
        sphere = finola.gaussian_curvature(surface(lambda x, y, r=radius: (r**2 - x**2 - y**2).sqrt()))
        torch.testing.assert_close(sphere, torch.full_like(sphere, 1 / radius**2), rtol=0.1, atol=0)
        middle = slice(8, 13)  # second order: the error of the stencil is of the order of 1 / radius^2
        flat = torch.full_like(sphere[middle, middle], 1 / radius**2)
        torch.testing.assert_close(sphere[middle, middle], flat, rtol=3 / radius**2, atol=0)
    assert (finola.gaussian_curvature(surface(lambda x, y: 0.01 * x * y)) < 0).all()
    for flat in (lambda x, y: 2 * x - 3 * y + 1, lambda x, y: (400 - x**2).sqrt(), lambda x, y: (x + y).square() / 50):
        torch.testing.assert_close(
            finola.gaussian_curvature(surface(flat)), torch.zeros(21, 21, dtype=torch.float64), atol=1e-12, rtol=0
        )
    saddle = finola.gaussian_curvature(surface(lambda x, y: (x**2 - y**2) / 2))[10, 10]
    assert float(saddle) == -1  # borders are exact for parabolas, too
    bowl = finola.gaussian_curvature(surface(lambda x, y: (x**2 + y**2) / 2, side=3))
    torch.testing.assert_close(bowl[0, 0], torch.tensor(1 / 9, dtype=torch.float64))


def test_peak_curvature_is_the_root_mean_square_of_both_peaks():
    """Fig. 5: of the largest positive and the largest negative value of Eq. 9."""
    z = randn(4, 5, 5)
    curvature = finola.gaussian_curvature(z)
    for i in range(4):
        high, low = max(float(curvature[i].max()), 0), min(float(curvature[i].min()), 0)
        assert float(finola.peak_curvature(z)[i]) == pytest.approx(math.sqrt((high**2 + low**2) / 2))
    bowl = surface(lambda x, y: (x**2 + y**2) / 2, side=5)  # no negative peak
    assert float(finola.peak_curvature(bowl)) == pytest.approx(math.sqrt(0.5))
    with pytest.raises(ValueError, match="three cells a side"):
        finola.gaussian_curvature(torch.zeros(2, 3))


def test_psnr_is_that_of_the_pixels_that_count():
    images, mask = images_of(2, 4) * 0.5, torch.zeros(2, 1, 4, 4)
    mask[:, :, 1:] = 1
    others = images + 0.1
    others[:, :, 0, 0] += 10
    torch.testing.assert_close(finola.psnr(images, others, mask), torch.full((2,), 20.0), rtol=1e-4, atol=0)
    assert (finola.psnr(images, others) < 20).all()
    torch.testing.assert_close(
        finola.psnr(torch.ones(1, 3, 2, 2), torch.full((1, 3, 2, 2), 9.0)), torch.tensor([100.0])
    )


# --- the embedding space ---------------------------------------------------------------------------------------------


def test_mirrors_interpolations_and_components():
    """Fig. 13, 14 and 15."""
    q = randn(50, 4)
    mean, other = q.mean(dim=0), randn(50, 4, seed=1)
    torch.testing.assert_close((finola.mirror(q, mean) + q) / 2, mean.expand_as(q))
    line = finola.interpolate(q, other, 5)
    torch.testing.assert_close(line[[0, 2, 4]], torch.stack([q, (q + other) / 2, other]))
    none, two, full = finola.principal_reconstructions(q, mean, torch.cov(q.T), (0, 2, 4))
    torch.testing.assert_close(none, mean.expand_as(q))
    torch.testing.assert_close(full, q)
    u, s, v = torch.linalg.svd(q - mean, full_matrices=False)
    torch.testing.assert_close(two, mean + u[:, :2] * s[:2] @ v[:2])


@pytest.mark.parametrize("count", [2, 4])
def test_gaussian_samples_have_the_mean_and_covariance(count):
    """Fig. 12, of fewer embeddings than channels and of more."""
    q = randn(count, 3) @ randn(3, 3, seed=1) + 5
    samples = finola.gaussian_samples(q, 40000, generator(0))
    torch.testing.assert_close(samples.mean(dim=0), q.mean(dim=0), rtol=0, atol=0.1)
    torch.testing.assert_close(torch.cov(samples.T), torch.cov(q.T), rtol=0.05, atol=0.05)


# --- modules ---------------------------------------------------------------------------------------------------------


def test_attention_pooling_is_attention_of_one_query_without_projections():
    """Appendix B."""
    pool, x = finola.AttentionPool(6, heads=2).double(), randn(3, 6, 2, 5)
    pool.query_token.data = randn(6, seed=1)
    tokens = x.flatten(2).transpose(1, 2)
    expected = reference.cross_attention(pool.query_token.expand(3, 1, 6), tokens, tokens, 2)[:, 0]
    torch.testing.assert_close(pool(x), expected)
    with pytest.raises(UserError, match="do not divide"):
        finola.AttentionPool(6, heads=4)


def test_the_upsampler_is_that_of_table_10():
    """Table 10, FINOLA: blocks and widths, from 16 x 16 to 256 x 256."""
    with torch.device("meta"):
        upsampler = finola.ConvUpsampler(3072)
        assert upsampler(torch.empty(1, 3072, 16, 16)).shape == (1, 3, 256, 256)
    rows = []
    for layer in upsampler.layers:
        if isinstance(layer, finola.ResConv):
            rows.append(("res", layer.layers[-1].out_channels))
            kernels = [conv.kernel_size for conv in layer.layers if isinstance(conv, torch.nn.Conv2d)]
            assert kernels == [(3, 3), (3, 3)]
        elif isinstance(layer, torch.nn.Conv2d):
            assert layer.kernel_size == (3, 3)
            rows.append(("conv", layer.out_channels))
    table = [("res", 512), ("conv", 512), ("res", 256), ("conv", 256), ("res", 256), ("conv", 256), ("res", 128)]
    assert rows == [*table, ("conv", 128), ("res", 128), ("conv", 3)]
    with torch.device("meta"):  # cells of 4 pixels need the last two doublings
        assert len(finola.ConvUpsampler(3072, cell=4).layers) == len(upsampler.layers) - 6
        assert finola.ConvUpsampler(3072, cell=4)(torch.empty(1, 3072, 16, 16)).shape == (1, 3, 64, 64)


def plain_upsampler(upsampler, z):
    """Table 10's stack with the norms, activations and shortcuts of VQGAN, from its convolutions alone."""

    def normed(x):
        groups = {64: 16, 32: 8, 16: 4}[x.shape[1]]  # 32 where there are that many times four channels
        return F.silu(F.group_norm(x, groups, eps=1e-6))

    def res(layer, x):
        first, second = (conv for conv in layer.layers if isinstance(conv, torch.nn.Conv2d))
        return layer.shortcut(x) + second(normed(first(normed(x))))

    convs = [layer for layer in upsampler.layers if isinstance(layer, finola.ResConv | torch.nn.Conv2d)]
    x = res(convs[0], z)
    for up, block in zip(convs[1:-1:2], convs[2:-1:2], strict=True):
        x = res(block, up(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)))
    return convs[-1](normed(x))


def test_the_upsampler_matches_the_layers_written_out():
    torch.manual_seed(0)
    upsampler, z = finola.ConvUpsampler(64, width=64), randn(2, 64, 2, 3, dtype=torch.float32)
    torch.testing.assert_close(upsampler(z), plain_upsampler(upsampler, z), rtol=1e-4, atol=1e-5)
    assert upsampler(z).shape == (2, 3, 32, 48)
    finer = finola.ConvUpsampler(64, width=64, cell=4)  # from the width that the table has before the last doublings
    widths = [layer.layers[-1].out_channels for layer in finer.layers if isinstance(layer, finola.ResConv)]
    assert widths == [32, 16, 16]
    torch.testing.assert_close(finer(z), plain_upsampler(finer, z), rtol=1e-4, atol=1e-5)
    assert [finola.normed(n)[0].num_groups for n in (3072, 512, 128, 64, 16, 6, 3)] == [32, 32, 32, 16, 4, 1, 1]


def test_the_masked_upsampler_keeps_cells_in_their_places():
    """Table 10, Masked FINOLA: each cell becomes its patch, after transformer blocks that know no positions."""
    torch.manual_seed(0)
    upsampler, z = finola.PatchUpsampler(4), torch.zeros(1, 4, 2, 3)
    z[0, 0, 1, 2] = 1
    changed = (upsampler(z) - upsampler(torch.zeros_like(z))).abs().sum(dim=(0, 1)) > 0
    assert changed.shape == (32, 48)
    assert changed[16:, 32:].all()
    assert changed.sum() == 256
    deep = finola.PatchUpsampler(16, blocks=6)
    assert len(deep.blocks) == 6
    assert {block.heads for block in deep.blocks} == {8}
    tokens = randn(1, 16, 1, 1, dtype=torch.float32)
    pixels = deep.linear(F.layer_norm(deep.blocks(tokens[:, :, 0, 0][:, None]), (16,), eps=1e-6))
    torch.testing.assert_close(deep(tokens), common.unpatchify(pixels, 16, 16, 16))
    assert float(deep.linear.bias.detach().abs().max()) == 0
    with torch.no_grad():  # the transformer lets cells talk, without positions: moving the map moves the picture
        mixing = finola.PatchUpsampler(16, blocks=1)
        z = randn(1, 16, 2, 2, dtype=torch.float32)
        torch.testing.assert_close(mixing(z.flip(2)).unflatten(2, (2, 16)), mixing(z).unflatten(2, (2, 16)).flip(2))


@pytest.mark.parametrize(
    ("width", "fine", "published"), [(2880, 192, (19.4, 9.2)), (1440, 96, (18.6, 8.4)), (720, 48, (18.2, 8.0))]
)
def test_the_decoders_have_the_published_number_of_parameters(width, fine, published):
    """Table 11, with the parameters of Table 18."""
    for depths, millions in zip(((5, 2, 2), (2, 1, 1)), published, strict=True):
        with torch.device("meta"):
            decoder = MFDecoder(depths, width, fine)
        assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(millions * 1e6, rel=0.03)


def test_the_decoder_goes_on_from_the_encoder():
    """Table 11: blocks and scales; queries of different images do not meet."""
    torch.manual_seed(0)
    encoder, decoder = common.MobileFormer("micro").eval(), MFDecoder((2, 1, 1), 256, 48, queries=7).eval()
    coarse, hidden = encoder(images_of(2, 64)[:, :, :48], hidden=True)  # an odd number of cells at 1/16
    logits, boxes = decoder(coarse, hidden[2])
    assert (logits.shape, boxes.shape) == ((4, 2, 7, 92), (4, 2, 7, 4))
    hidden_units = [block.mobile.mlp["fc1"].out_features for block in decoder.stages[0]]
    assert hidden_units == [2048, 2048]
    assert [len(stage) for stage in decoder.stages] == [2, 1, 1]
    assert 0 < boxes.min() < boxes.max() < 1
    (logits.sum() + boxes.sum()).backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is None] == []
    swapped_images = decoder(coarse.flip(0), hidden[2].flip(0))[0]
    torch.testing.assert_close(swapped_images, logits.flip(1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_decoder_is_that_of_table_11_step_by_step():
    """Down, then up twice beside the encoder's maps, with positions at each scale; queries look at each map."""
    torch.manual_seed(0)
    decoder = MFDecoder((1, 1, 1), 32, 16, queries=5).eval()
    coarse, fine = randn(2, 32, 4, 6, seed=1).float(), randn(2, 16, 8, 12, seed=2).float()
    x, queries, outputs = decoder.down(coarse), decoder.queries.expand(2, -1, -1), []
    assert x.shape == (2, 256, 2, 3)
    for scale, blocks in enumerate(decoder.stages):
        if scale:
            encoded = decoder.lateral[scale - 1](fine if scale == 2 else coarse)
            larger = F.interpolate(x, encoded.shape[2:], mode="bilinear", align_corners=False)
            x = decoder.up[scale - 1](larger) + encoded
        positions = reference.sincos_positions(*x.shape[2:], 256).float()  # (H W, 256), row by row
        x = x + positions.T.reshape(256, *x.shape[2:])
        (block,) = blocks
        x, queries = block(x, queries)
        outputs.append(queries)
    logits, boxes = decoder(coarse, fine)
    outputs = torch.stack(outputs)
    outputs = (outputs - outputs.mean(-1, keepdim=True)) / (outputs.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(logits, decoder.classify(outputs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(boxes, decoder.locate(outputs), rtol=1e-4, atol=1e-4)


# --- norms of section 4 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["running", "batch"])
def test_moving_averages_are_those_of_each_step_of_each_walk(norm):
    """Section 4, "moving averages to normalize the input during inference", beside the norm of Eq. 1."""
    module, plain, q = (
        random_finola(4, kind=lambda dim: finola.AveragedFinola(dim, norm)),
        random_finola(4),
        randn(5, 4),
    )
    assert module.statistics.shape == (2, 8, 64, 1 if norm == "running" else 4)
    trained = module.train()(q, 6)
    over = -1 if norm == "running" else 0  # the norm of a position, or that of a channel over all positions
    mean, var = q.mean(dim=over), q.var(dim=over, correction=0)
    if norm == "running":
        torch.testing.assert_close(trained, plain(q, 6))
        mean, var = mean.mean().view(1), var.mean().view(1)
    else:
        expected = q + (q - mean) / (var + 1e-5).sqrt() @ module.right.T
        torch.testing.assert_close(module.walk(q[None], "right", 1)[1, 0], expected)
        module.statistics[0], module.statistics[1] = 0, 1
        trained = module(q, 6)
    first = module.statistics.clone()
    torch.testing.assert_close(first[0, :2, 0], 0.1 * mean.expand(2, -1))  # as batch norm: a tenth of each batch
    for _ in range(200):
        module(q, 6)
    averages = module.statistics.unflatten(1, (2, 4))  # (2, stages, directions, steps, ...)
    torch.testing.assert_close(averages[0, 0, :2, 0], mean.expand(2, -1))
    torch.testing.assert_close(averages[1, 0, :2, 0], var.expand(2, -1))
    row = trained[:, :, 3]  # the second stage downwards starts from the whole middle row
    torch.testing.assert_close(averages[0, 1, 2, 0], row.mean().view(1) if norm == "running" else row.mean(dim=(0, 2)))
    before = module.statistics.clone()
    moved = module.eval()(q, 6)
    torch.testing.assert_close(module.statistics, before)
    steps = []
    for walk in (0, 4):  # to the right from q, in the first stage and in the second: the mean of both walks
        mean, var = module.statistics[:, walk, 0]
        steps.append(q + ((q - mean) / (var + 1e-5).sqrt()) @ module.right.T)
    torch.testing.assert_close(moved[:, :, 3, 4], sum(steps) / 2)
    with pytest.raises(ValueError, match="kept for 64 steps of a walk, not 65"):
        module(q, (1, 66), (0, 0))
    with pytest.raises(ValueError, match="unrolled from one vector"):
        module.blockwise(randn(1, 4, 2, 2), 4, 0, 0)


def test_without_a_norm_the_recursion_is_linear():
    """Section 4, "the possibility of removing normalization"."""
    module, q = random_finola(3, scale=0.1, kind=finola.UnnormedFinola), randn(2, 3)
    right, down = (torch.eye(3, dtype=torch.float64) + matrix for matrix in (module.right, module.down))
    torch.testing.assert_close(module(q, 3, (0, 0))[:, :, 0, 2], q @ (right @ right).T)
    block = q[:, :, None, None]
    torch.testing.assert_close(module.blockwise(block, 2, 0, 0)[:, :, 1, 1], q @ (right @ down + down @ right).T / 2)


def test_the_norm_is_that_of_the_settings():
    modules = {norm: tiny_finola(norm=norm).finola for norm in ("channel", "none", "running", "batch")}
    kinds = [Finola, finola.UnnormedFinola, finola.AveragedFinola, finola.AveragedFinola]
    assert [type(module) for module in modules.values()] == kinds
    assert [modules[norm].norm for norm in ("running", "batch")] == ["running", "batch"]


# --- the method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    method = tiny_finola(variant=variant)
    method(images_of(4, 64))["loss"].backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("origin", "place"), [(n, p) for n, p in finola.ORIGINS.items()])
def test_q_can_be_put_in_the_corners_and_matrices_without_use_are_frozen(origin, place):
    """Fig. 11."""
    method = tiny_finola(origin=origin)
    expected = (2, 2) if place is None else tuple(x % 4 for x in place)
    q = randn(2, 16, dtype=torch.float32)
    torch.testing.assert_close(method.unroll(q)[:, :, expected[0], expected[1]], q)
    method(images_of(2, 64))["loss"].backward()
    trained = [name for name in finola.DIRECTIONS if getattr(method.finola, name).requires_grad]
    assert len(trained) == (4 if place is None else 2)
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("variant", ["masked_e", "masked_b"])
def test_masked_variants_see_the_block_and_are_judged_by_the_rest(variant):
    """Section 3: pixels outside the block change the loss, not the prediction; those inside the prediction alone."""
    method = tiny_finola(variant=variant).eval()
    images, corner = images_of(3, 64), torch.tensor([[0, 0], [1, 2], [2, 1]])
    hidden = method.scored(images, corner).bool()
    assert (hidden.sum(dim=(1, 2, 3)) == 64 * 64 * 3 // 4).all()
    assert not hidden[1, 0, 16:48, 32:].any()
    with torch.no_grad():
        prediction, loss = method.decode(method.feature_map(images, corner)), method(images, corner=corner)["loss"]
        other = torch.where(hidden, images_of(3, 64, seed=1), images)
        torch.testing.assert_close(method.decode(method.feature_map(other, corner)), prediction)
        assert float(method(other, corner=corner)["loss"]) != pytest.approx(float(loss))
        normed, predicted = (method.encoder.normalize(x) for x in (images, prediction))
        expected = (normed - predicted).square()[hidden.expand_as(images)].mean()
        torch.testing.assert_close(method(images, corner=corner)["loss"], expected)
        psnr = finola.psnr(images, prediction, hidden).mean()
        torch.testing.assert_close(method(images, corner=corner)["psnr"], psnr)
        seen = torch.where(hidden, images, images_of(3, 64, seed=1))
        assert not torch.allclose(method.decode(method.feature_map(seen, corner)), prediction)


def test_masked_b_leaves_the_visible_block_where_it_is():
    """Fig. 4: the map holds the encoder's block, projected, at the row and column where the image was cut."""
    method, images = tiny_finola(variant="masked_b").eval(), images_of(2, 64)
    found = method.feature_map(images, torch.tensor([[0, 1], [2, 0]]))
    for i, (row, column) in enumerate(((0, 1), (2, 0))):
        block = images[i : i + 1, :, 16 * row : 16 * row + 32, 16 * column : 16 * column + 32]
        expected = method.project(method.encoder(block))[0]
        torch.testing.assert_close(found[i, :, row : row + 2, column : column + 2], expected, rtol=1e-4, atol=1e-5)


def test_the_loss_of_the_whole_image_is_the_mean_squared_error_of_normalised_pixels():
    """Section 2."""
    method, images = tiny_finola().eval(), images_of(2, 64)
    out = method(images)
    difference = (method.decode(method.feature_map(images)) - images) / 0.25
    torch.testing.assert_close(out["loss"], difference.square().mean())


def test_masked_e_puts_q_at_the_centre_of_each_images_block():
    """Fig. 4, left."""
    method = tiny_finola(variant="masked_e")
    q, corners = randn(9, 16, dtype=torch.float32), list(itertools.product(range(3), repeat=2))
    found = method.unroll(q, torch.tensor(corners))
    for i, (row, column) in enumerate(corners):
        torch.testing.assert_close(found[i], method.finola(q[i : i + 1], 4, (row + 1, column + 1))[0])


@pytest.mark.parametrize("variant", ["masked_e", "masked_b"])
def test_training_draws_its_blocks(variant):
    method, images, losses = tiny_finola(variant=variant).eval(), images_of(1, 64), set()
    for seed in range(8):
        torch.manual_seed(seed)
        losses.add(float(method(images)["loss"].detach()))
    assert len(losses) > 2


def test_blocks_float_over_the_whole_grid():
    corners = tiny_finola(variant="masked_b").draw_corners(500, "cpu")
    assert {tuple(corner) for corner in corners.tolist()} == set(itertools.product(range(3), repeat=2))


@given(st.integers(1, 4), st.integers(1, 3), seeds)
def test_cut_takes_a_window_of_each_image(count, side, seed):
    maps = rand(count, 2, 5, 6, seed=seed)
    corner = torch.stack([torch.randint(0, n - side + 1, (count,), generator=generator(seed)) for n in (5, 6)], dim=1)
    for i, (row, column) in enumerate(corner.tolist()):
        window = maps[i, :, row : row + side, column : column + side]
        torch.testing.assert_close(finola.cut(maps, corner, side)[i], window)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_method_runs_under_autocast(variant, dtype):
    method = tiny_finola(variant=variant)
    with torch.autocast("cpu", dtype):
        out = method(images_of(2, 64))
    out["loss"].backward()
    assert out["loss"].dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_pictures_show_what_is_seen_and_what_becomes_of_it(variant):
    method, images = tiny_finola(variant=variant).eval(), images_of(3, 64)
    rows = method.pictures(images)
    assert rows.shape == (3, len(method.captions), 3, 64, 64)
    assert 0 <= rows.min() <= rows.max() <= 1
    torch.testing.assert_close(rows[:, 0], images)
    if variant != "finola":
        hidden = (rows[:, 1] == 0.5).all(dim=1, keepdim=True)
        assert (hidden.sum(dim=(1, 2, 3)) == 64 * 64 * 3 // 4).all()
        torch.testing.assert_close(torch.where(hidden, 0, rows[:, 2]), torch.where(hidden, 0, images))
        assert not torch.allclose(rows[:, 2], images)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_captions_stand_over_what_they_name(variant):
    """The whole image and its reconstruction; or what is seen, the rest in the mean colour, and the rest predicted."""
    method, images = tiny_finola(variant=variant).eval(), images_of(3, 64)
    method.encoder.mean.copy_(torch.tensor([0.1, 0.3, 0.6]).view(3, 1, 1))
    torch.manual_seed(5)
    rows = method.pictures(images)
    if variant == "finola":
        assert method.captions == ("image", "reconstruction")
        torch.testing.assert_close(rows[:, 1], method.decode(method.feature_map(images)).clamp(0, 1))
        return
    assert method.captions == ("image", "masked image", "reconstruction")
    torch.manual_seed(5)
    corner = method.draw_corners(3, "cpu")
    predicted = method.decode(method.feature_map(images, corner)).clamp(0, 1)
    for i, (row, column) in enumerate((16 * corner).tolist()):
        masked, restored = method.encoder.mean.expand(3, 64, 64).clone(), predicted[i].clone()
        for picture in (masked, restored):
            picture[:, row : row + 32, column : column + 32] = images[i, :, row : row + 32, column : column + 32]
        torch.testing.assert_close(rows[i], torch.stack([images[i], masked, restored]))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_finer_map_keeps_everything_in_its_place(variant):
    """With a Mobile-Former of stride 4 a cell has 4 x 4 pixels: what is cut, predicted and judged, for each image."""
    method, images = tiny_finola(variant=variant, width="micro4", image_size=32).eval(), images_of(2, 32)
    corner = None if variant == "finola" else torch.tensor([[1, 3], [4, 0]])  # in cells, of blocks of 4 x 4 of them
    z, hidden = method.feature_map(images, corner), method.scored(images, corner)
    assert (z.shape, method.decode(z).shape) == ((2, 16, 8, 8), (2, 3, 32, 32))
    if variant == "finola":
        torch.testing.assert_close(z[:, :, 4, 4], method.pool(method.encoder(images)))
        assert hidden.all()
        return
    for i, (row, column) in enumerate(((1, 3), (4, 0))):
        rows, columns = slice(4 * row, 4 * row + 16), slice(4 * column, 4 * column + 16)
        block = method.encoder(images[i : i + 1, :, rows, columns])  # (1, C, 4, 4)
        expected = torch.ones(1, 32, 32)
        expected[:, rows, columns] = 0
        torch.testing.assert_close(hidden[i], expected)
        if variant == "masked_b":
            found = z[i, :, row : row + 4, column : column + 4]
            torch.testing.assert_close(found, method.project(block)[0], rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(z[i, :, row + 2, column + 2], method.pool(block)[0], rtol=1e-4, atol=1e-5)
    linear = finola.PatchUpsampler(4, cell=4)
    z = torch.zeros(1, 4, 2, 3)
    z[0, 0, 1, 2] = 1
    changed = (linear(z) - linear(torch.zeros_like(z))).abs().sum(dim=(0, 1)) > 0
    assert changed.shape == (8, 12) and changed[4:, 8:].all() and changed.sum() == 16


@pytest.mark.parametrize("variant", ["masked_e", "masked_b"])
def test_a_frozen_encoder_is_kept_while_the_rest_learns(variant, tmp_path):
    """Fig. 8: "the encoders of the two masked FINOLA variants are frozen"; of the rest what fits is taken over."""
    fields = {"width": "micro4", "image_size": 16, "channels": 16 if variant == "masked_e" else 256}
    masked = tiny_finola(variant=variant, **fields)
    for name, value in masked.encoder.state_dict().items():
        value += 1 if "running" in name else 0  # so that statistics are those of some training
    torch.save({"identity": {}, "weights": masked.state_dict()}, tmp_path / "last.pt")
    fields["start"] = str(tmp_path / "last.pt")
    method = tiny_finola(freeze_encoder=True, **fields).train()
    assert method.training and method.finola.training and not method.encoder.training
    kept = ["finola", "pool"] if variant == "masked_e" else ["finola"]
    for name, value in masked.state_dict().items():
        if name.split(".")[0] in ("encoder", *kept):
            torch.testing.assert_close(method.state_dict()[name], value)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method(images_of(2, 16))["loss"].backward()
    method.optimizer(method.config).step()
    moved = {name.split(".")[0] for name, x in method.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {"finola", "pool", "upsampler"}
    free = tiny_finola(**fields).train()
    assert free.encoder.training and all(p.requires_grad for p in free.parameters())


def recomputing(recompute, **fields):
    """FINOLA in float64 on pictures of 16 x 16, that computes again in the backward pass or does not."""
    return tiny_finola(**{"width": "micro4", "image_size": 16, "recompute": recompute} | fields).double()


@pytest.mark.parametrize(("variant", "norm"), [("finola", "batch"), ("masked_e", "running"), ("masked_b", "channel")])
def test_recomputing_changes_nothing_that_a_step_leaves_behind(variant, norm):
    """Loss, gradients, and what counts batches: the averages of the batch norms and of section 4, exactly once."""
    left = []
    for recompute in (False, True):
        method = recomputing(recompute, variant=variant, norm=norm)
        before = {name: x.clone() for name, x in method.named_buffers()}
        torch.manual_seed(0)
        loss = method(images_of(17, 16).double())["loss"]  # eight parts of two and one of one
        loss.backward()
        left.append((loss, {name: p.grad for name, p in method.named_parameters()}, dict(method.named_buffers())))
    torch.testing.assert_close(left[1][:2], left[0][:2], rtol=1e-9, atol=1e-14)
    moved = {name.rpartition(".")[2] for name, x in left[1][2].items() if not torch.equal(x, before[name])}
    averages = {"statistics"} if norm in ("batch", "running") else set()
    assert moved == {"running_mean", "running_var", "num_batches_tracked"} | averages
    assert left[1][2]["encoder.blocks.0.mobile.narrow.1.num_batches_tracked"] == 1
    for name, x in left[1][2].items():
        assert torch.equal(x, left[0][2][name]), name


@pytest.mark.parametrize(("variant", "share"), [("finola", 0.07), ("masked_b", 0.2)])  # its encoder's head is wider
def test_recomputing_keeps_little_for_the_backward_pass(variant, share):
    kept, z = {}, randn(17, 16, 4, 4).requires_grad_()
    for recompute in (False, True):
        method = recomputing(recompute, variant=variant)
        for name, part, x in (("encoder", method.encoder, images_of(17, 16).double()), ("up", method.upsample, z)):
            sizes = {}

            def pack(tensor, sizes=sizes):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = part(x)  # alive, so that no address comes twice
            kept[name, recompute] = sum(sizes.values())
            del out
    assert kept["encoder", True] < share * kept["encoder", False]  # those of stem and head
    assert kept["up", True] < 0.1 * kept["up", False]


def test_recomputing_takes_a_sixteenth_of_the_batch_at_a_time():
    method, parts = recomputing(True), []
    method.upsampler.register_forward_pre_hook(lambda module, args: parts.append(len(args[0])))
    z = randn(40, 16, 4, 4)
    pictures = method.upsample(z.requires_grad_())
    assert parts == [3] * 13 + [1]
    torch.testing.assert_close(pictures, method.upsampler(z))
    del parts[:]
    pictures.sum().backward()
    assert sorted(parts) == [1] + [3] * 13


def test_recomputed_parts_sum_their_gradients_in_float32():
    """Under autocast: sixteen times the same image have sixteen times its gradient, to the last bit."""
    sums = []
    for count in (1, 16):
        method = recomputing(True).float()
        with torch.autocast("cpu", torch.bfloat16):
            pictures = method.upsample(randn(1, 16, 4, 4, dtype=torch.float32).expand(count, -1, -1, -1))
        pictures.float().square().sum().backward()
        sums.append({name: p.grad for name, p in method.upsampler.named_parameters() if p.ndim == 4})
    assert len(sums[0]) == 11
    for name, gradient in sums[0].items():
        assert torch.equal(16 * gradient, sums[1][name]), name


def test_a_run_goes_on_with_or_without_recomputing():
    """Resuming looks at what changes the result; so runs from before the flag go on, too."""
    methods = [recomputing(recompute) for recompute in (False, True)]
    data, stepper = shapes(4, 16), common.Stepper(None, methods[0].config, torch.device("cpu"))
    first, second = (identity_of(method, data, method.config, stepper) for method in methods)
    assert first == second


def test_the_settings_reach_the_parts():
    method = tiny_finola(variant="masked_b", upsampler_blocks=3, channels=24)
    assert len(method.upsampler.blocks) == 3
    assert not tiny_finola(variant="masked_e", upsampler_blocks=3).upsampler.blocks  # Table 10: -E has none
    assert method.encoder.dim == 256  # its own width, projected before FINOLA
    assert method.project.out_channels == method.finola.dim == 24
    method = tiny_finola(channels=24, pool_heads=3, norm="running", upsampler_width=32)
    assert (method.encoder.dim, method.pool.heads, method.finola.norm) == (24, 3, "running")
    assert method.upsampler.layers[0].layers[-1].out_channels == 32
    for compiled in (False, True):
        method = tiny_finola(recompute=True, compile=compiled)
        assert method.recompute == method.encoder.recompute == (not compiled)


def test_recipes_are_table_12():
    """Table 12; C = 512 of the masked variants is that of Table 15."""

    def read(*flags):
        return read_flags(Config, finola.RECIPES, ["--data", "imagenet", *flags])

    plain = read()
    assert (plain.epochs, plain.batch_size, plain.warmup_epochs) == (100, 128, 10)
    assert (plain.base_lr, plain.weight_decay, plain.image_size) == (1.5e-4, 0.1, 256)
    assert (plain.width, plain.channels, plain.variant) == ("2880", 3072, "finola")
    assert (plain.crop_min, plain.flip, plain.betas) == (0.08, 0.0, (0.9, 0.95))
    assert (plain.pool_heads, plain.upsampler_width, plain.norm, plain.origin) == (8, 512, "channel", "center")
    for variant in ("masked_e", "masked_b"):
        masked = read("--variant", variant)
        assert (masked.epochs, masked.batch_size, masked.channels) == (1600, 1024, 512)
        assert (masked.base_lr, masked.upsampler_blocks) == (1.5e-4, 6)
    assert plain.recompute and masked.recompute and not read("--recipe", "shapes").recompute


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "masked"}, "unknown --variant 'masked'"),
        ({"width": "100"}, "unknown --width '100'"),
        ({"origin": "left"}, "unknown --origin 'left'"),
        ({"norm": "layer"}, "unknown --norm 'layer'"),
        ({"image_size": 72}, "--image-size 72 is not a multiple of 16"),
        ({"image_size": 48, "variant": "masked_e"}, "--image-size 48 is not a multiple of 32"),
        ({"image_size": 18, "width": "micro4"}, "--image-size 18 is not a multiple of 4"),
        ({"image_size": 12, "width": "micro4", "variant": "masked_b"}, "--image-size 12 is not a multiple of 8"),
        ({"freeze_encoder": True}, "--freeze-encoder keeps an encoder that was trained; give its run's last.pt"),
        ({"channels": 3}, "--channels 3 makes no sense; give 4 or more"),
        ({"upsampler_width": 2}, "--upsampler-width 2 makes no sense; give 4 or more"),
        ({"upsampler_blocks": -1, "variant": "masked_b"}, "--upsampler-blocks -1"),
        ({"origin": "top_left", "variant": "masked_b"}, "--origin belongs to --variant finola"),
        ({"norm": "running", "variant": "masked_b"}, "--norm running"),
        ({"pool_heads": 5}, "do not divide into 5 heads"),
    ],
)
def test_finola_refuses_what_makes_no_sense(fields, message):
    with pytest.raises(UserError, match=message):
        tiny_finola(**fields)


def test_the_probe_measures_psnr_of_test_images():
    method, data = tiny_finola(variant="masked_b", probe_images=4, amp="off", image_size=32).eval(), shapes(20, 32)
    values = []
    for seed in range(2):
        torch.manual_seed(seed)
        values.append(method.probe(lambda x: x.mean(dim=(2, 3)), data, data, method.config))
    assert values[0] == values[1]  # the same blocks each time
    torch.manual_seed(method.config.seed)
    expected = method(data.images[labelled(data, 4)] / 255)["psnr"]
    assert values[0]["psnr"] == pytest.approx(float(expected), rel=1e-4)
    assert values[0].keys() == {"knn", "linear", "effective_rank", "psnr"}
