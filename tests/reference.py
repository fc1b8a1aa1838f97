"""Slow, obvious versions of the equations, to compare the fast ones with. Loops over images and pixels, float64."""

import itertools
import math

import torch


def patchify(images, patch):
    """Patches by four loops: row-major patches, (p q c) inside."""
    batch, channels, height, width = images.shape
    out = []
    for b in range(batch):
        for top, left in itertools.product(range(0, height, patch), range(0, width, patch)):
            pixels = [
                images[b, c, top + p, left + q]
                for p, q, c in itertools.product(range(patch), range(patch), range(channels))
            ]
            out.append(torch.stack(pixels))
    return torch.stack(out).view(batch, -1, patch * patch * channels)


def sincos_positions(height, width, dim):
    """The 2-D position code, entry by entry."""
    out = torch.zeros(height * width, dim, dtype=torch.float64)
    quarter = dim // 4
    for row, column, i in itertools.product(range(height), range(width), range(quarter)):
        omega = 10000 ** (-i / quarter)
        n = row * width + column
        out[n, i], out[n, quarter + i] = math.sin(column * omega), math.cos(column * omega)
        out[n, 2 * quarter + i], out[n, 3 * quarter + i] = math.sin(row * omega), math.cos(row * omega)
    return out


def reconstruction_loss(prediction, target, mask):
    """MAE's loss: mean over masked patches of the mean squared error of a patch."""
    errors = [
        ((prediction[b, n] - target[b, n]) ** 2).mean()
        for b, n in itertools.product(*map(range, mask.shape))
        if mask[b, n]
    ]
    return sum(errors) / len(errors)


def squared_distances(z):
    """|z_i - z_j|^2 from the B x B x D differences."""
    return (z[:, None, :] - z[None, :, :]).square().sum(dim=-1)


def affinity(z, kernel_factor=1.0, diagonal=False):
    """MAGMA Eq. 4, pair by pair. Needs distances that differ."""
    d, size = squared_distances(z), range(len(z))
    pairs = [d[i, j] for i, j in itertools.product(size, size) if diagonal or i != j]
    sigma = torch.stack(pairs).std()
    w = torch.zeros_like(d)
    for i, j in itertools.product(size, size):
        if diagonal or i != j:
            w[i, j] = torch.exp(-kernel_factor * d[i, j] / sigma)
    return w


def laplacian(w, normalized=True, eps=1e-4):
    """MAGMA Eq. 7 (with the identity minus it), or D - W, entry by entry."""
    degree, size = w.sum(dim=1), range(len(w))
    out = torch.zeros_like(w)
    for i, j in itertools.product(size, size):
        if normalized:
            out[i, j] = float(i == j) - w[i, j] / torch.sqrt((degree[i] + eps) * (degree[j] + eps))
        else:
            out[i, j] = (degree[i] if i == j else 0.0) - w[i, j]
    return out


def manifold_loss(regularized, reference, kernel_factor=1.0, diagonal=False, normalized=True):
    """MAGMA Eq. 6 as a double sum over images of L_ij <y_i, y_j>."""
    matrix, size = laplacian(affinity(reference, kernel_factor, diagonal), normalized), range(len(reference))
    terms = [matrix[i, j] * (regularized[i] @ regularized[j]) for i, j in itertools.product(size, size)]
    return sum(terms) / len(reference) ** 2


def pairwise_loss(regularized, w):
    """MAGMA Eq. 2 for one pair of layers: sum of w_ij |y_i - y_j|^2 over all i and j, over B^2."""
    size = range(len(w))
    terms = [w[i, j] * (regularized[i] - regularized[j]).square().sum() for i, j in itertools.product(size, size)]
    return sum(terms) / len(w) ** 2


def inverse_manifold_loss(regularized, reference, kernel_factor=0.5, eps=1e-6):
    """MAGMA Eq. 3 with Eq. 5, over i != j."""
    d, size = squared_distances(reference), range(len(reference))
    sigma = torch.stack([d[i, j] for i, j in itertools.product(size, size) if i != j]).std()
    total = 0.0
    for i, j in itertools.product(size, size):
        if i != j:
            w = torch.exp((kernel_factor * d[i, j] / sigma).clamp_max(30))
            total = total + w / ((regularized[i] - regularized[j]).square().sum() + eps)
    return total / len(reference) ** 2


def uniformity_loss(z):
    """U-MAE: mean squared cosine over all pairs, i = j too."""
    unit = [row / row.norm() for row in z]
    return sum((a @ b) ** 2 for a, b in itertools.product(unit, unit)) / len(z) ** 2


def contrastive_loss(a, b, temperature):
    """SimCLR Eq. 1, averaged over all 2B anchors."""
    z = [row / row.norm() for row in torch.cat([a, b])]
    total = 0.0
    for i, anchor in enumerate(z):
        partner = (i + len(a)) % len(z)
        others = sum(torch.exp(anchor @ z[k] / temperature) for k in range(len(z)) if k != i)
        total = total - torch.log(torch.exp(anchor @ z[partner] / temperature) / others)
    return total / len(z)


def vicreg_loss(a, b, weights):
    """VICReg Eq. 1 to 6, dimension by dimension."""
    dims = range(a.shape[1])
    invariance = sum(((x - y) ** 2).mean() for x, y in zip(a, b, strict=True)) / len(a)
    variance = covariance = 0.0
    for z in (a, b):
        variance = variance + sum(torch.relu(1 - torch.sqrt(z[:, i].var() + 1e-4)) for i in dims) / a.shape[1]
        for i, j in itertools.product(dims, dims):
            if i != j:
                both = (z[:, i] - z[:, i].mean()) @ (z[:, j] - z[:, j].mean()) / (len(z) - 1)
                covariance = covariance + both**2 / a.shape[1]
    return weights[0] * invariance + weights[1] * variance + weights[2] * covariance


def knn_accuracy(bank, bank_labels, queries, labels, k, weigh=False):
    """k nearest neighbours, query by query, by sorting all distances; with `weigh` they vote by 1 / distance."""
    right = 0
    for query, truth in zip(queries, labels.tolist(), strict=True):
        distance = [math.dist(row.tolist(), query.tolist()) for row in bank]
        votes = {}
        for i in sorted(range(len(bank)), key=distance.__getitem__)[:k]:
            votes[int(bank_labels[i])] = votes.get(int(bank_labels[i]), 0) + (1 / (distance[i] + 1e-5) if weigh else 1)
        right += min(votes, key=lambda c: (-votes[c], c)) == truth
    return 100 * right / len(labels)


def ridge_predictions(train, labels, test, classes, strength):
    """Scores (M, classes) of ridge regression with an unpenalised offset, from the normal equations."""
    offset, onehot = train.mean(dim=0), torch.eye(classes, dtype=train.dtype)[labels]
    x = train - offset
    weight = torch.linalg.solve(
        x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (onehot - onehot.mean(0))
    )
    return (test - offset) @ weight + onehot.mean(dim=0)


def davies_bouldin(features, labels):
    """The mean over classes of the worst (s_i + s_j) / |c_i - c_j|, class by class."""
    groups = [features[labels == label] for label in sorted(set(labels.tolist()))]
    centres = [group.mean(dim=0) for group in groups]
    spread = [sum(float((x - c).norm()) for x in group) / len(group) for group, c in zip(groups, centres, strict=True)]
    worst = []
    for i in range(len(groups)):
        ratios = [
            (spread[i] + spread[j]) / float((centres[i] - centres[j]).norm()) for j in range(len(groups)) if j != i
        ]
        worst.append(max(ratios))
    return sum(worst) / len(worst)


def class_cosines(features, labels):
    """Mean cosine over all pairs of one class and of two classes, pair by pair."""
    same, different = [], []
    for i, j in itertools.combinations(range(len(features)), 2):
        cosine = float(features[i] @ features[j] / (features[i].norm() * features[j].norm()))
        (same if labels[i] == labels[j] else different).append(cosine)
    return sum(same) / len(same), sum(different) / len(different)


def topk_attention(q, k, v, topk):
    """MixedAE's homologous attention, query by query; scores must differ."""
    out = torch.zeros_like(v)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        scores = torch.stack([q[b, h, i] @ k[b, h, j] / math.sqrt(q.shape[-1]) for j in range(k.shape[2])])
        kept = scores.argsort(descending=True)[:topk]
        for j, weight in zip(kept, scores[kept].softmax(dim=0), strict=True):
            out[b, h, i] += weight * v[b, h, j]
    return out


def homologous_contrastive(z, assignment, temperature):
    """MixedAE Eq. 7, anchor by anchor and positive by positive."""
    anchors = []
    for g, anchor in itertools.product(*map(range, assignment.shape)):
        cosine = [float(z[g, anchor] @ y / (z[g, anchor].norm() * y.norm())) / temperature for y in z[g]]
        others = sum(math.exp(s) for j, s in enumerate(cosine) if j != anchor)
        relatives = [
            -math.log(math.exp(s) / others)
            for j, s in enumerate(cosine)
            if j != anchor and assignment[g, j] == assignment[g, anchor]
        ]
        if relatives:
            anchors.append(sum(relatives) / len(relatives))
    return sum(anchors) / max(1, len(anchors))


def mutual_information(joint):
    """I(A; B) in nats from {(a, b): probability}."""
    left, right = {}, {}
    for (a, b), p in joint.items():
        left[a], right[b] = left.get(a, 0.0) + p, right.get(b, 0.0) + p
    return sum(p * math.log(p / (left[a] * right[b])) for (a, b), p in joint.items() if p > 0)


# --- Mobile-Former ---------------------------------------------------------------------------------------------------


def cross_attention(q, k, v, heads):
    """Attention one query and one head at a time."""
    out, width = torch.zeros_like(q), q.shape[-1] // heads
    for b, m, h in itertools.product(range(q.shape[0]), range(q.shape[1]), range(heads)):
        part = slice(h * width, (h + 1) * width)
        scores = torch.stack([(q[b, m, part] * k[b, n, part]).sum() / math.sqrt(width) for n in range(k.shape[1])])
        weights = scores.exp() / scores.exp().sum()
        out[b, m, part] = sum(weight * v[b, n, part] for n, weight in enumerate(weights))
    return out


# --- FINOLA ----------------------------------------------------------------------------------------------------------


def norm_linear_step(z, matrix, eps=1e-5):
    """Eq. 1 for one vector (C,)."""
    mean = z.sum() / len(z)
    deviation = (((z - mean) ** 2).sum() / len(z) + eps).sqrt()
    return z + matrix @ ((z - mean) / deviation)


def finola_walks(q, matrices, size, origin):
    """Both walks to each cell, from q anew each time: columns first, rows first, each (B, C, H, W)."""
    maps = torch.zeros(2, len(q), q.shape[1], *size, dtype=q.dtype)
    for b, y, x in itertools.product(range(len(q)), range(size[0]), range(size[1])):
        across = ["right"] * (x - origin[1]) + ["left"] * (origin[1] - x)
        along = ["down"] * (y - origin[0]) + ["up"] * (origin[0] - y)
        for i, path in enumerate((across + along, along + across)):
            z = q[b]
            for name in path:
                z = norm_linear_step(z, matrices[name])
            maps[i, b, :, y, x] = z
    return maps


def blockwise(z, matrices, row, column):
    """Masked-FINOLA-B cell by cell: which cells a visible one predicts, and how; and how often each was written."""
    channels, block = z.shape[0], z.shape[1]
    out, written = torch.zeros(channels, 2 * block, 2 * block, dtype=z.dtype), torch.zeros(2 * block, 2 * block)
    for i, j in itertools.product(range(block), range(block)):
        y, x = row + i, column + j  # where the visible cell is in the map
        down, right = y >= 2 * row, x >= 2 * column
        other_y = y - row + block if down else y - row
        other_x = x - column + block if right else x - column
        along, across = matrices["down" if down else "up"], matrices["right" if right else "left"]
        cell = z[:, i, j]
        beside, below = norm_linear_step(cell, across), norm_linear_step(cell, along)
        both = (norm_linear_step(beside, along) + norm_linear_step(below, across)) / 2
        for place, value in (((y, x), cell), ((y, other_x), beside), ((other_y, x), below), ((other_y, other_x), both)):
            out[(slice(None), *place)] = value
            written[place] += 1
    return out, written


def pde_residual(z, matrices, origin):
    """Eq. 2 over all steps away from the origin, step by step, for one map (C, H, W): along x and along y."""
    results = []
    for axis, (before, after) in ((2, ("left", "right")), (1, ("up", "down"))):
        wrong, moved = 0.0, 0.0
        for y, x in itertools.product(range(z.shape[1]), range(z.shape[2])):
            place = (y, x)[axis - 1]
            for name, sign in ((after, 1), (before, -1)):
                if (place - origin[axis - 1]) * sign < 0 or not 0 <= place + sign < z.shape[axis]:
                    continue
                other = (y, x + sign) if axis == 2 else (y + sign, x)
                difference = z[(slice(None), *other)] - z[:, y, x]
                wrong += ((z[(slice(None), *other)] - norm_linear_step(z[:, y, x], matrices[name])) ** 2).sum()
                moved += (difference**2).sum()
        results.append((wrong / moved).sqrt())
    return results


def gaussian_curvature(z):
    """Eq. 9 at the interior cells of one surface (H, W), by loops."""
    out = torch.zeros(z.shape[0] - 2, z.shape[1] - 2, dtype=z.dtype)
    for y, x in itertools.product(range(1, z.shape[0] - 1), range(1, z.shape[1] - 1)):
        z_x, z_y = (z[y, x + 1] - z[y, x - 1]) / 2, (z[y + 1, x] - z[y - 1, x]) / 2
        z_xx, z_yy = z[y, x + 1] - 2 * z[y, x] + z[y, x - 1], z[y + 1, x] - 2 * z[y, x] + z[y - 1, x]
        z_xy = ((z[y + 1, x + 1] - z[y + 1, x - 1]) / 2 - (z[y - 1, x + 1] - z[y - 1, x - 1]) / 2) / 2
        out[y - 1, x - 1] = (z_xx * z_yy - z_xy**2) / (1 + z_x**2 + z_y**2) ** 2
    return out


def random_patches(images, count, low, high, generator, aspect=(0.5, 2.0)):
    """Rectangles of given areas, pixel by pixel; the draws come in the order area, aspect, top, left."""
    batch, _, height, width = images.shape
    draw = torch.rand(4, batch, count, generator=generator)
    out = images.clone()
    for b, k in itertools.product(range(batch), range(count)):
        area = (low + (high - low) * float(draw[0, b, k])) * height * width
        ratio = aspect[0] * (aspect[1] / aspect[0]) ** float(draw[1, b, k])
        tall, wide = min(math.sqrt(area * ratio), height), min(math.sqrt(area / ratio), width)
        top, left = float(draw[2, b, k]) * (height - tall), float(draw[3, b, k]) * (width - wide)
        for i, j in itertools.product(range(height), range(width)):
            if top <= i + 0.5 < top + tall and left <= j + 0.5 < left + wide:
                out[b, :, i, j] = 0
    return out


def restoration_loss(chain, images, criterion, weight=None):
    """Eq. 4 of energy-inspired pretraining, number by number; with weights, a mean over images of weighted means."""
    total = 0.0
    for restored, b in itertools.product(chain, range(len(images))):
        errors, count = 0.0, 0.0
        for c, i, j in itertools.product(*map(range, images.shape[1:])):
            share = 1.0 if weight is None else weight[b, 0, i, j]
            error = abs(restored[b, c, i, j] - images[b, c, i, j])
            if criterion == "mse":
                errors += share * error**2
            else:
                errors += share * (error**2 / 2 if error < 1 else error - 0.5)
            count += share
        total += errors / max(count, 1) / len(images) / len(chain)
    return torch.as_tensor(total, dtype=images.dtype)


def swin_block(block, x):
    """A block of Swin, cell by cell: each attends to the cells of its window; x (B, H, W, D)."""
    batch, height, width, dim = x.shape
    side, inner = min(block.window, height, width), block.block
    shift = side // 2 if block.shifted and max(height, width) > side else 0
    heads, d = inner.heads, dim // inner.heads

    def window(i, size):  # windows start `shift` cells in; what is left over at both ends are windows of their own
        return (i - shift) // side if shift else i // side

    out = x.clone()
    for b, i, j in itertools.product(range(batch), range(height), range(width)):
        cells = [
            (p, q)
            for p, q in itertools.product(range(height), range(width))
            if window(p, height) == window(i, height) and window(q, width) == window(j, width)
        ]
        keys = inner.attn["qkv"](inner.norm1(torch.stack([x[b, p, q] for p, q in cells])))[:, dim:]
        query = inner.attn["qkv"](inner.norm1(x[b, i, j]))[:dim]
        parts = []
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            scores = keys[:, :dim][:, part] @ query[part] / math.sqrt(d)
            bias = [
                block.position_bias[(i - p + block.window - 1) * (2 * block.window - 1) + j - q + block.window - 1, h]
                for p, q in cells
            ]
            parts.append((scores + torch.stack(bias)).softmax(dim=0) @ keys[:, dim:][:, part])
        y = x[b, i, j] + inner.attn["proj"](torch.cat(parts))
        hidden = torch.nn.functional.gelu(inner.mlp["fc1"](inner.norm2(y)))
        out[b, i, j] = y + inner.mlp["fc2"](hidden)
    return out


def softsort(probability, count, temperature, weights):
    """d/dp of sum_j w_j sum_{i < count} softmax_j(-|sorted_i - p_j| / temperature), by central differences."""

    def value(p):
        total = 0.0
        for row, weight in zip(p, weights, strict=True):
            for high in row.sort(descending=True).values[:count]:
                total += float(((-(high - row).abs() / temperature).softmax(dim=0) * weight).sum())
        return total

    out = torch.zeros_like(probability)
    for place in itertools.product(*map(range, probability.shape)):
        shift = torch.zeros_like(probability)
        shift[place] = 1e-6
        out[place] = (value(probability + shift) - value(probability - shift)) / 2e-6
    return out


def transformer(state, prefix, x, heads):
    """The blocks `prefix`0, `prefix`1, ... of a state by timm's names, on tokens (M, D) of one image, head by head."""

    def norm(x, name):
        centred = x - x.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        return centred / (variance + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for block in itertools.count():
        name, dim = f"{prefix}{block}", x.shape[1]
        if f"{name}.norm1.weight" not in state:
            return x, norm, linear
        qkv, seen = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv"), []
        for head in range(heads):
            q, k, v = (qkv[:, i * dim + head * dim // heads :][:, : dim // heads] for i in range(3))
            scores = torch.exp(q @ k.T / math.sqrt(dim // heads))
            seen.append(scores / scores.sum(dim=1, keepdim=True) @ v)
        x = x + linear(torch.cat(seen, dim=1), f"{name}.attn.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        x = x + linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, f"{name}.mlp.fc2")


def masked_autoencoder(state, images, noise, ratio, heads, decoder_heads, norm_pixels=True):
    """MAE by the names of its release, image by image: normalised images (B, 3, H, W), noise (B, N), whose smallest
    entries stay visible -> encoded tokens (B, 1 + M, D) of CLS and of visible patches by row, prediction (B, N, P),
    loss, as one number."""
    kernel, encoded, predictions = state["patch_embed.proj.weight"], [], []
    patch, count = kernel.shape[-1], noise.shape[1]
    pixels = patchify(images, patch)  # (p q c)
    kernel = torch.stack([kernel[:, c, p, q] for p, q, c in itertools.product(range(patch), range(patch), range(3))])
    hidden = torch.ones(noise.shape, dtype=torch.bool)
    for b in range(len(images)):
        visible = sorted(sorted(range(count), key=lambda n: float(noise[b, n]))[: int(count * (1 - ratio))])
        hidden[b, visible] = False
        tokens = pixels[b] @ kernel + state["patch_embed.proj.bias"] + state["pos_embed"][0, 1:]
        cls = state["cls_token"][0] + state["pos_embed"][0, :1]
        x, norm, linear = transformer(state, "blocks.", torch.cat([cls, tokens[visible]]), heads)
        encoded.append(norm(x, "norm"))
        small = linear(encoded[-1], "decoder_embed")
        full = [small[1 + visible.index(n)] if n in visible else state["mask_token"][0, 0] for n in range(count)]
        x = torch.stack([small[0], *full]) + state["decoder_pos_embed"][0]
        x, norm, linear = transformer(state, "decoder_blocks.", x, decoder_heads)
        predictions.append(linear(norm(x, "decoder_norm"), "decoder_pred")[1:])
    prediction = torch.stack(predictions)
    if norm_pixels:
        pixels = (pixels - pixels.mean(dim=2, keepdim=True)) / (pixels.var(dim=2, keepdim=True) + 1e-6).sqrt()
    return torch.stack(encoded), prediction, reconstruction_loss(prediction, pixels, hidden)


def timm_features(state, images, heads, global_pool):
    """timm's VisionTransformer with `fc_norm=False` from its state dict alone, image by image, patch by patch:
    normalised images (B, 3, H, W) -> (B, D)."""
    kernel, features = state["patch_embed.proj.weight"], []
    patch, (height, width) = kernel.shape[-1], images.shape[2:]
    for image in images:
        tokens = [state["cls_token"][0, 0]]
        for top, left in itertools.product(range(0, height, patch), range(0, width, patch)):
            seen = kernel * image[:, top : top + patch, left : left + patch]
            tokens.append(seen.sum(dim=(1, 2, 3)) + state["patch_embed.proj.bias"])
        x, norm, _ = transformer(state, "blocks.", torch.stack(tokens) + state["pos_embed"][0], heads)
        x = norm(x, "norm")
        features.append(x[0] if global_pool == "token" else x[1:].mean(dim=0))
    return torch.stack(features)


# --- MLO-MAE ---------------------------------------------------------------------------------------------------------


def adamw_step(weight, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, decay=0.0):
    """A weight after AdamW's step number `step`, from the averages before it, and the averages after it. Autograd sees
    through all of it: the square root, whose slope at 0 is infinite, is not taken there.
    """
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * gradient
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * gradient**2
    square = exp_avg_sq / (1 - betas[1] ** step)
    root = torch.where(square > 0, torch.where(square > 0, square, 1.0) ** 0.5, 0.0)
    after = weight - lr * decay * weight - lr * exp_avg / (1 - betas[0] ** step) / (root + eps)
    return after, exp_avg, exp_avg_sq


def adamw_steps(weights, gradients, states, lr, **options):
    """As `adamw_step` for {name: weight}; `states` {name: (exp_avg, exp_avg_sq, number of this step)} go on too."""
    found = {name: adamw_step(w, gradients[name], *states[name], lr, **options) for name, w in weights.items()}
    after = {name: (m, v, states[name][2] + 1) for name, (_, m, v) in found.items()}
    return {name: w for name, (w, _, _) in found.items()}, after


def adamw_cycle(losses, encoder, head, maskings, states, lrs, **options):
    """Level III's loss after a step of AdamW in level I for each of `maskings`, and one in level II: Eq. 6 to 8, in
    which autograd sees all. Losses and parameters are those of `mlo_mae.hypergradient`; `states` of encoder and head.
    """
    of_encoder, of_head = states
    for masking in maskings:
        gradients = torch.func.grad(losses[0])(encoder, masking)
        encoder, of_encoder = adamw_steps(encoder, gradients, of_encoder, lrs[0], **options)
    gradients = torch.func.grad(losses[1], argnums=1)(encoder, head)
    head, _ = adamw_steps(head, gradients, of_head, lrs[1], **options)
    return losses[2](encoder, head), encoder, head


# --- t-SNE -----------------------------------------------------------------------------------------------------------


def tsne_row(distances, i, perplexity):
    """Eq. 1 of t-SNE: the row of point i from squared distances (N, N), its sigma by bisection, one point at a time."""
    narrow, wide = 1e-3, 1e3
    for _ in range(200):
        sigma = (narrow * wide) ** 0.5
        row = [0.0 if j == i else math.exp(-d / (2 * sigma**2)) for j, d in enumerate(distances[i].tolist())]
        p = [x / sum(row) if sum(row) else 0.0 for x in row]
        entropy = -sum(x * math.log(x) for x in p if x)
        narrow, wide = (narrow, sigma) if entropy > math.log(perplexity) else (sigma, wide)
    return torch.tensor(p, dtype=torch.float64)


def tsne_cost(p, y):
    """KL(P || Q) of t-SNE, with Eq. 4, pair by pair: p (N, N), y (N, 2)."""
    pairs = list(itertools.permutations(range(len(y)), 2))
    weights = {(i, j): 1 / (1 + ((y[i] - y[j]) ** 2).sum()) for i, j in pairs}
    total = sum(weights.values())
    return sum(p[ij] * torch.log(p[ij] / (weights[ij] / total)) for ij in pairs)


def tsne_walk(p, y, steps, rate, exaggerated, early):
    """Algorithm 1 of t-SNE from points y (N, 2), by autograd of the cost; gains number by number. Early momentum and
    exaggeration last so many steps.
    """
    velocity, gains = torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        factor = 4 if step < exaggerated else 1
        y = y.detach().requires_grad_()
        apart = 1 + (y[:, None] - y[None]).square().sum(dim=2)
        # Of log q_ij = -log(apart) - log(total), the second part counts once, since P sums to 1: q is not exaggerated.
        cost = (factor * p * apart.log()).sum() + ((1 / apart).sum() - len(y)).log()
        (slope,) = torch.autograd.grad(cost, y)
        for i, k in itertools.product(range(len(y)), range(2)):
            same = torch.sign(slope[i, k]) == torch.sign(velocity[i, k])
            gains[i, k] = max(0.01, gains[i, k] * 0.8 if same else gains[i, k] + 0.2)
        velocity = (0.5 if step < early else 0.8) * velocity - rate * gains * slope
        y = y + velocity
        y = y - y.mean(dim=0)
    return y.detach()


def least_cost(cost):
    """The total cost of the best pairs of rows and columns (lists of lists), by all ways to choose them."""
    if len(cost) > len(cost[0]):
        cost = list(zip(*cost, strict=True))
    ways = itertools.permutations(range(len(cost[0])), len(cost))
    return min(sum(row[column] for row, column in zip(cost, way, strict=True)) for way in ways)


def average_precision(truth, found):
    """COCO's evaluation of boxes, finding by finding: truth and found as those of the fast one, all keys given."""

    def iou(a, b, crowd):
        shared = 1.0
        for axis in (0, 1):
            shared *= max(0.0, min(a[axis] + a[axis + 2], b[axis] + b[axis + 2]) - max(a[axis], b[axis]))
        return shared / (a[2] * a[3] + (0.0 if crowd else b[2] * b[3] - shared)) if shared else 0.0

    def precision_at(label, low, high, threshold):
        """The precisions at 101 recalls of one class, size and threshold; None where no truth counts."""
        judged, truths = [], 0  # (score, right or wrong) of what counts
        for t, f in zip(truth, found, strict=True):
            mine = [i for i, x in enumerate(t["labels"]) if x == label]
            aside = {i: bool(t["crowd"][i]) or not low <= t["area"][i] <= high for i in mine}
            truths += sum(not aside[i] for i in mine)
            best = sorted((i for i, x in enumerate(f["labels"]) if x == label), key=lambda i: -f["scores"][i])
            taken = set()
            for d in best[:100]:
                box, hit = f["boxes"][d], None
                for those in (False, True):  # what counts, then what is aside
                    if hit is not None:
                        break
                    most = threshold
                    for i in mine:
                        if aside[i] == those and not (i in taken and not t["crowd"][i]):
                            value = iou(box, t["boxes"][i], t["crowd"][i])
                            if value >= most:
                                most, hit = value, i
                if hit is not None:
                    taken.add(hit)
                    if not aside[hit]:
                        judged.append((f["scores"][d], True))
                elif low <= box[2] * box[3] <= high:
                    judged.append((f["scores"][d], False))
        if not truths:
            return None
        judged.sort(key=lambda pair: -pair[0])
        points, right = [], 0
        for count, (_, good) in enumerate(judged, start=1):
            right += good
            points.append((right / truths, right / count))
        return [max((p for recall, p in points if recall >= i * 0.01), default=0.0) for i in range(101)]

    sizes = {"": (0, 1e10), "s": (0, 1024), "m": (1024, 9216), "l": (9216, 1e10)}
    labels = sorted({int(x) for t in truth for x in t["labels"]})
    result, levels = {}, [0.5 + i * ((0.95 - 0.5) / 9) for i in range(10)]  # in float64, rounding and all
    for name, chosen, size in [
        ("AP", levels, ""),
        ("AP50", levels[:1], ""),
        ("AP75", levels[5:6], ""),
        *((f"AP{size}", levels, size) for size in "sml"),
    ]:
        rows = [precision_at(label, *sizes[size], level) for label in labels for level in chosen]
        values = [value for row in rows if row is not None for value in row]
        result[name] = sum(values) / len(values) if values else -1
    return result


def mean_iou(prediction, truth, classes, ignore=255):
    """IoU of each class from sets of pixels, and its mean over classes that some pixel has or is given."""
    pairs = [(p, t) for p, t in zip(prediction, truth, strict=True) if t != ignore]
    ious = []
    for name in range(classes):
        found = {i for i, (p, _) in enumerate(pairs) if p == name}
        real = {i for i, (_, t) in enumerate(pairs) if t == name}
        if found or real:
            ious.append(len(found & real) / len(found | real))
    return sum(ious) / len(ious) if ious else math.nan


def nearest(labels, top, left, height, width, size):
    """The pixel that the centre of each output pixel lies in, by two loops; a negative width flips."""
    out = torch.zeros(size, size, dtype=torch.long)
    for i, j in itertools.product(range(size), range(size)):
        y, x = math.floor(top + (i + 0.5) * height / size), math.floor(left + (j + 0.5) * width / size)
        out[i, j] = labels[min(max(y, 0), labels.shape[0] - 1), min(max(x, 0), labels.shape[1] - 1)]
    return out


def pixel_loss(logits, labels, ignore=255):
    """Cross-entropy of each pixel that counts over the number of all; logits (B, K, H, W) of the labels' size."""
    total = 0.0
    for b, i, j in itertools.product(*map(range, labels.shape)):
        if labels[b, i, j] != ignore:
            total = total - torch.log_softmax(logits[b, :, i, j], dim=0)[labels[b, i, j]]
    return total / labels.numel()


def detection_loss(logits, boxes, labels, truths):
    """DETR's loss of one layer, picture by picture: logits (B, Q, K + 1), boxes (B, Q, 4) and, a list a picture, labels
    and boxes (n, 4), centres and sides. Pairs by all ways to choose them; (class, distance, overlap) without weights.
    """

    def giou(a, b):
        (ax, ay, aw, ah), (bx, by, bw, bh) = a.tolist(), b.tolist()
        a, b = (
            (ax - aw / 2, ay - ah / 2, ax + aw / 2, ay + ah / 2),
            (bx - bw / 2, by - bh / 2, bx + bw / 2, by + bh / 2),
        )
        shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        union = aw * ah + bw * bh - shared
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        return shared / union - (hull - union) / hull

    nothing, entropy, weights, distance, overlap, count = logits.shape[-1] - 1, 0.0, 0.0, 0.0, 0.0, 0
    for one, own, names, places in zip(logits, boxes, labels, truths, strict=True):
        likely = one.softmax(dim=-1)

        def cost(q, t, likely=likely, own=own, names=names, places=places):
            away = float((own[q] - places[t]).abs().sum())
            return 5 * away - float(likely[q, names[t]]) - 2 * giou(own[q], places[t])

        ways = itertools.permutations(range(len(one)), len(names))
        best = min(ways, key=lambda way: sum(cost(q, t) for t, q in enumerate(way)))
        for q in range(len(one)):
            name = names[best.index(q)] if q in best else nothing
            weight = 0.1 if name == nothing else 1.0
            entropy, weights = entropy - weight * math.log(float(likely[q, name])), weights + weight
        for t, q in enumerate(best):
            distance, overlap = (
                distance + float((own[q] - places[t]).abs().sum()),
                overlap + 1 - giou(own[q], places[t]),
            )
        count += len(names)
    return entropy / weights, distance / max(1, count), overlap / max(1, count)
