"""The layers of the network as Triton kernels, each with its backward pass.

Sizes: N images, H×W pixels, C input and K output channels, M = N·H·W pixels in all. Activations are bfloat16 and
channels_last, so a matrix (M, C); what is summed is float32. Names: z is a convolution's output, which the norm takes;
d… is the gradient of …; a norm's zhat is what it scales and shifts.

A program takes consecutive blocks, or images at a fixed stride, and writes its share of a sum to a row of its own, so
that sums are the same in each run. rows is the stride of these rows, in elements.
"""

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
def share_of_blocks(M, BLOCK: constexpr):
    """Returns the first pixel of this program, and how many blocks from there are its own."""
    blocks = tl.cdiv(tl.cdiv(M, BLOCK), tl.num_programs(0))
    return tl.program_id(0) * blocks * BLOCK, blocks


# ------------------------------------------------------------------------------ 3×3 convolutions


@triton.jit(do_not_specialize=["N"])
def conv3x3(
    x, weight, bias, skip, out, moments, N, stride_n, stride_h, stride_p, stride_k, stride_c, stride_tap,
    H: constexpr, W: constexpr, stride_w: constexpr, C: constexpr, K: constexpr, FLIP: constexpr,
    COLUMNS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """out (M, K) = x (N, C, H, W), of any layout, convolved with weight, plus bias (K,) and skip (M, K).

    FLIP: the taps in the opposite order, as for a gradient. moments (programs, 2, K): the means of each program's
    share of out, and sums of squared differences from them.
    """
    M = N * H * W
    first, blocks = share_of_blocks(M, BLOCK)
    DTYPE: constexpr = out.dtype.element_ty
    k = tl.arange(0, max(K, 16))
    mean, squares, count = tl.zeros([max(K, 16)], tl.float32), tl.zeros([max(K, 16)], tl.float32), 0.0
    above = row_of_taps(weight, 0, stride_k, stride_c, stride_tap, C, K, FLIP, COLUMNS, DTYPE)
    level = row_of_taps(weight, 1, stride_k, stride_c, stride_tap, C, K, FLIP, COLUMNS, DTYPE)
    below = row_of_taps(weight, 2, stride_k, stride_c, stride_tap, C, K, FLIP, COLUMNS, DTYPE)
    for i in range(blocks):
        m = first + i * BLOCK + tl.arange(0, BLOCK)
        acc = tl.zeros([BLOCK, max(K, 16)], tl.float32)
        pixels = row_of_pixels(x, m, -1, M, stride_n, stride_h, stride_p, H, W, stride_w, C, COLUMNS, DTYPE)
        acc = tl.dot(pixels, above, acc)
        pixels = row_of_pixels(x, m, 0, M, stride_n, stride_h, stride_p, H, W, stride_w, C, COLUMNS, DTYPE)
        acc = tl.dot(pixels, level, acc)
        pixels = row_of_pixels(x, m, 1, M, stride_n, stride_h, stride_p, H, W, stride_w, C, COLUMNS, DTYPE)
        acc = tl.dot(pixels, below, acc)
        at, mask = m[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :]
        if bias is not None:
            acc += tl.load(bias + k, k < K, 0.0)[None, :]
        if skip is not None:
            acc += tl.load(skip + at, mask, 0.0).to(tl.float32)
        z = acc.to(DTYPE)
        tl.store(out + at, z, mask)
        if moments is not None:
            mean, squares, count = add_moments(mean, squares, count, z.to(tl.float32), m < M, M - first - i * BLOCK)
    if moments is not None:
        at = moments + tl.program_id(0) * 2 * K + k
        tl.store(at, mean, k < K)
        tl.store(at + K, squares, k < K)


@triton.jit
def row_of_taps(
    weight, row, stride_k, stride_c, stride_tap,
    C: constexpr, K: constexpr, FLIP: constexpr, COLUMNS: constexpr, DTYPE: constexpr,
):  # fmt: skip
    """Returns a third of a weight, (COLUMNS, K): a column of pixels is a tap and a channel."""
    j, k = tl.arange(0, COLUMNS), tl.arange(0, max(K, 16))
    tap = row * 3 + j // C
    tap = 8 - tap if FLIP else tap
    at = (j % C * stride_c + tap * stride_tap)[:, None] + k[None, :] * stride_k
    return tl.load(weight + at, (j < 3 * C)[:, None] & (k < K)[None, :], 0.0).to(DTYPE)


@triton.jit
def row_of_pixels(
    x, m, dh, M, stride_n, stride_h, stride_p,
    H: constexpr, W: constexpr, stride_w: constexpr, C: constexpr, COLUMNS: constexpr, DTYPE: constexpr,
):  # fmt: skip
    """Returns what three neighbouring taps, dh below the pixels m, see of x: (BLOCK, COLUMNS), zero outside."""
    j = tl.arange(0, COLUMNS)
    h, w = (m // W) % H + dh, (m % W)[:, None] + (j // C - 1)[None, :]
    at = (m // (H * W) * stride_n + h * stride_h)[:, None] + w * stride_w + (j % C * stride_p)[None, :]
    inside = ((m < M) & (h >= 0) & (h < H))[:, None] & (w >= 0) & (w < W) & (j < 3 * C)[None, :]
    return tl.load(x + at, inside, 0.0).to(DTYPE)


@triton.jit(do_not_specialize=["N"])
def conv3x3_weight_grad(
    x, dz, dweight, N, stride_n, stride_h, stride_p, stride_k, stride_c, stride_tap, rows,
    H: constexpr, W: constexpr, stride_w: constexpr, C: constexpr, K: constexpr, COLUMNS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Writes each program's share of dweight, from x (N, C, H, W) of any layout and dz (M, K).

    The grid's second axis is the weight's row of three taps.
    """
    M, row = N * H * W, tl.program_id(1)
    first, blocks = share_of_blocks(M, BLOCK)
    j, k = tl.arange(0, COLUMNS), tl.arange(0, K)
    acc = tl.zeros([K, COLUMNS], tl.float32)
    for i in range(blocks):
        m = first + i * BLOCK + tl.arange(0, BLOCK)
        pixels = row_of_pixels(
            x, m, row - 1, M, stride_n, stride_h, stride_p, H, W, stride_w, C, COLUMNS, dz.dtype.element_ty
        )
        gradients = tl.load(dz + m[:, None] * K + k[None, :], (m < M)[:, None], 0.0)
        acc = tl.dot(tl.trans(gradients), pixels, acc)
    at = k[:, None] * stride_k + (j % C * stride_c + (row * 3 + j // C) * stride_tap)[None, :]
    tl.store(dweight + tl.program_id(0) * rows + at, acc, (j < 3 * C)[None, :])


@triton.jit
def add_moments(mean, squares, count, values, valid, left):
    """Returns the moments merged with those of a block's first `left` rows, the valid ones (Chan et al. 1979)."""
    rows = tl.maximum(tl.minimum(left, values.shape[0]), 0).to(tl.float32)
    block_mean = tl.sum(tl.where(valid[:, None], values, 0.0), 0) / tl.maximum(rows, 1.0)
    differences = tl.where(valid[:, None], values - block_mean[None, :], 0.0)
    delta, total = block_mean - mean, tl.maximum(count + rows, 1.0)
    squares += tl.sum(differences * differences, 0) + delta * delta * (count * rows / total)
    return mean + delta * (rows / total), squares, count + rows


# ------------------------------------------------------------------- batch norm, ReLU, dropout


@triton.jit(do_not_specialize=["N"])
def batch_norm_relu(
    z, moments, norm_weight, norm_bias, scale, out, statistics, running_mean, running_var, N, momentum, eps,
    HW: constexpr, K: constexpr, MOMENTS_BLOCK: constexpr, MOMENTS_ROWS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """out (M, K) = ReLU of the normalised z, times scale (N, K), dropout's; and statistics (2, K): mean and 1 / std.

    moments: of the conv3x3 before, from MOMENTS_ROWS programs with blocks of MOMENTS_BLOCK.
    """
    M = N * HW
    k, p = tl.arange(0, K), tl.arange(0, MOMENTS_ROWS)
    share = tl.cdiv(tl.cdiv(M, MOMENTS_BLOCK), MOMENTS_ROWS) * MOMENTS_BLOCK
    counts = tl.maximum(tl.minimum(M - p * share, share), 0).to(tl.float32)[:, None]
    means = tl.load(moments + p[:, None] * 2 * K + k[None, :])
    mean = tl.sum(means * counts, 0) / M
    squares = tl.load(moments + p[:, None] * 2 * K + K + k[None, :])
    squares += counts * (means - mean[None, :]) * (means - mean[None, :])
    var = tl.sum(squares, 0) / M
    inv_std = tl.rsqrt(var + eps)
    if tl.program_id(0) == 0:
        tl.store(statistics + k, mean)
        tl.store(statistics + K + k, inv_std)
        before = tl.load(running_mean + k)
        tl.store(running_mean + k, before + momentum * (mean - before))
        before = tl.load(running_var + k)
        tl.store(running_var + k, before + momentum * (var * (M / (M - 1.0)) - before))
    gain, shift = tl.load(norm_weight + k), tl.load(norm_bias + k)
    first, blocks = share_of_blocks(M, BLOCK)
    for i in range(blocks):
        m = first + i * BLOCK + tl.arange(0, BLOCK)
        at, mask = m[:, None] * K + k[None, :], (m < M)[:, None]
        zhat = (tl.load(z + at, mask, 0.0).to(tl.float32) - mean[None, :]) * inv_std[None, :]
        values = relu(zhat * gain[None, :] + shift[None, :])
        if scale is not None:
            values *= tl.load(scale + (m // HW)[:, None] * K + k[None, :], mask, 0.0)
        tl.store(out + at, values, mask)


@triton.jit(do_not_specialize=["N"])
def batch_norm_sums(
    z, dout, statistics, norm_weight, norm_bias, scale, dnorm_weight, dnorm_bias, N, rows,
    HW: constexpr, K: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Writes each program's share of the gradients of the norm's weight and bias, (K,) each."""
    M = N * HW
    k = tl.arange(0, K)
    mean, inv_std = tl.load(statistics + k), tl.load(statistics + K + k)
    gain, shift = tl.load(norm_weight + k), tl.load(norm_bias + k)
    dgain, dshift = tl.zeros([K], tl.float32), tl.zeros([K], tl.float32)
    first, blocks = share_of_blocks(M, BLOCK)
    for i in range(blocks):
        m = first + i * BLOCK + tl.arange(0, BLOCK)
        zhat, dnorm = backward_to_norm(z, dout, scale, mean, inv_std, gain, shift, m, M, HW, k, K)
        dgain += tl.sum(dnorm * zhat, 0)
        dshift += tl.sum(dnorm, 0)
    tl.store(dnorm_weight + tl.program_id(0) * rows + k, dgain)
    tl.store(dnorm_bias + tl.program_id(0) * rows + k, dshift)


@triton.jit(do_not_specialize=["N"])
def batch_norm_backward(
    z, dout, statistics, norm_weight, norm_bias, scale, dnorm_weight, dnorm_bias, dz, dbias, N, rows,
    HW: constexpr, K: constexpr, SUMS_ROWS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """dz (M, K), from what batch_norm_sums left. The convolution's bias has gradient 0: the norm subtracts it."""
    M = N * HW
    k, p = tl.arange(0, K), tl.arange(0, SUMS_ROWS)
    mean, inv_std = tl.load(statistics + k), tl.load(statistics + K + k)
    gain, shift = tl.load(norm_weight + k), tl.load(norm_bias + k)
    dgain = tl.sum(tl.load(dnorm_weight + p[:, None] * rows + k[None, :]), 0) / M
    dshift = tl.sum(tl.load(dnorm_bias + p[:, None] * rows + k[None, :]), 0) / M
    first, blocks = share_of_blocks(M, BLOCK)
    for i in range(blocks):
        m = first + i * BLOCK + tl.arange(0, BLOCK)
        zhat, dnorm = backward_to_norm(z, dout, scale, mean, inv_std, gain, shift, m, M, HW, k, K)
        gradients = (dnorm - dshift[None, :] - zhat * dgain[None, :]) * (gain * inv_std)[None, :]
        tl.store(dz + m[:, None] * K + k[None, :], gradients, (m < M)[:, None])
    tl.store(dbias + tl.program_id(0) * rows + k, tl.zeros([K], tl.float32))


@triton.jit
def backward_to_norm(z, dout, scale, mean, inv_std, gain, shift, m, M, HW, k, K: constexpr):
    """Returns zhat and the gradient of gain · zhat + shift, for the pixels m."""
    at, mask = m[:, None] * K + k[None, :], (m < M)[:, None]
    zhat = (tl.load(z + at, mask, 0.0).to(tl.float32) - mean[None, :]) * inv_std[None, :]
    gradients = tl.load(dout + at, mask, 0.0).to(tl.float32)
    if scale is not None:
        gradients *= tl.load(scale + (m // HW)[:, None] * K + k[None, :], mask, 0.0)
    return zhat, tl.where(zhat * gain[None, :] + shift[None, :] > 0, gradients, 0.0)


@triton.jit
def relu(values):
    return tl.where(values < 0, 0.0, values)  # as PyTorch's, which lets NaN through


# ------------------------------------------------- group, layer and instance norm, ReLU, dropout


@triton.jit
def group_norm_relu(
    z, norm_weight, norm_bias, scale, out, eps,
    HW: constexpr, K: constexpr, GROUPS: constexpr, PIXELS: constexpr,
):  # fmt: skip
    """out = ReLU of the normalised z, times scale (N, K), dropout's; a program takes an image."""
    n, k, pixel = tl.program_id(0), tl.arange(0, K), tl.arange(0, PIXELS)
    at, mask = n * HW * K + pixel[:, None] * K + k[None, :], (pixel < HW)[:, None]
    zhat, _ = normalise(tl.load(z + at, mask, 0.0).to(tl.float32), mask, HW, eps, K, GROUPS)
    values = relu(zhat * tl.load(norm_weight + k)[None, :] + tl.load(norm_bias + k)[None, :])
    if scale is not None:
        values *= tl.load(scale + n * K + k)[None, :]
    tl.store(out + at, values, mask)


@triton.jit(do_not_specialize=["N"])
def group_norm_backward(
    z, dout, norm_weight, norm_bias, scale, dz, dnorm_weight, dnorm_bias, dbias, N, eps, rows,
    HW: constexpr, K: constexpr, GROUPS: constexpr, PIXELS: constexpr,
):  # fmt: skip
    """dz, and each program's share of the gradients of the norm's weight and bias and of the convolution's bias."""
    k, pixel = tl.arange(0, K), tl.arange(0, PIXELS)
    gain, shift = tl.load(norm_weight + k), tl.load(norm_bias + k)
    dgain, dshift, dadded = tl.zeros([K], tl.float32), tl.zeros([K], tl.float32), tl.zeros([K], tl.float32)
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        at, mask = n * HW * K + pixel[:, None] * K + k[None, :], (pixel < HW)[:, None]
        zhat, inv_std = normalise(tl.load(z + at, mask, 0.0).to(tl.float32), mask, HW, eps, K, GROUPS)
        gradients = tl.load(dout + at, mask, 0.0).to(tl.float32)
        if scale is not None:
            gradients *= tl.load(scale + n * K + k)[None, :]
        dnorm = tl.where(zhat * gain[None, :] + shift[None, :] > 0, gradients, 0.0)
        sums, products = tl.sum(dnorm, 0), tl.sum(dnorm * zhat, 0)
        dgain += products
        dshift += sums
        mean = group_mean(sums * gain, HW, K, GROUPS)
        slope = group_mean(products * gain, HW, K, GROUPS)
        gradients = (dnorm * gain[None, :] - mean[None, :] - zhat * slope[None, :]) * inv_std[None, :]
        gradients = tl.where(mask, gradients, 0.0)
        dadded += tl.sum(gradients, 0)
        tl.store(dz + at, gradients, mask)
    tl.store(dnorm_weight + tl.program_id(0) * rows + k, dgain)
    tl.store(dnorm_bias + tl.program_id(0) * rows + k, dshift)
    tl.store(dbias + tl.program_id(0) * rows + k, dadded)


@triton.jit
def normalise(values, mask, HW, eps, K: constexpr, GROUPS: constexpr):
    """Returns an image (PIXELS, K) less its groups' means, divided by their deviations; and 1 / deviation (K,)."""
    mean = group_mean(tl.sum(values, 0), HW, K, GROUPS)
    differences = tl.where(mask, values - mean[None, :], 0.0)
    inv_std = tl.rsqrt(group_mean(tl.sum(differences * differences, 0), HW, K, GROUPS) + eps)
    return differences * inv_std[None, :], inv_std


@triton.jit
def group_mean(sums, HW, K: constexpr, GROUPS: constexpr):
    """Returns each channel's group's mean (K,), of the channels' sums over HW pixels."""
    if GROUPS < K:
        of_group = tl.sum(tl.reshape(sums, [GROUPS, K // GROUPS]), 1)
        sums = tl.reshape(tl.broadcast_to(of_group[:, None], [GROUPS, K // GROUPS]), [K])
    return sums / (HW * (K // GROUPS))


# --------------------------------------------------------------- 1×1 convolution and max pooling


@triton.jit(do_not_specialize=["N"])
def conv1x1_maxpool(
    x, weight, bias, out, argmax, N, H: constexpr, W: constexpr, C: constexpr, K: constexpr, BLOCK: constexpr
):
    """out (M / 4, K) = the largest of 2×2 pixels of x (M, C) · weight (K, C) + bias; argmax: which of the four."""
    M = N * H * W // 4
    first, blocks = share_of_blocks(M, BLOCK)
    c, k = tl.arange(0, C), tl.arange(0, max(K, 16))
    DTYPE: constexpr = x.dtype.element_ty
    filters = tl.load(weight + k[None, :] * C + c[:, None], (k < K)[None, :], 0.0).to(DTYPE)
    added = tl.load(bias + k, k < K, 0.0)
    for i in range(blocks):
        m = first + i * BLOCK + tl.arange(0, BLOCK)
        corner, mask = corner_of(m, H, W), (m < M)[:, None]
        best, place = tl.zeros([BLOCK, max(K, 16)], tl.float32), tl.zeros([BLOCK, max(K, 16)], tl.int8)
        for corner_pixel in tl.static_range(4):
            pixel = corner + corner_pixel // 2 * W + corner_pixel % 2
            pixels = tl.load(x + pixel[:, None] * C + c[None, :], mask, 0.0)
            z = (tl.dot(pixels, filters) + added[None, :]).to(DTYPE).to(tl.float32)
            better = (z > best) | (z != z) | (corner_pixel == 0)
            best, place = tl.where(better, z, best), tl.where(better, corner_pixel, place).to(tl.int8)
        at, mask = m[:, None] * K + k[None, :], mask & (k < K)[None, :]
        tl.store(out + at, best, mask)
        tl.store(argmax + at, place, mask)


@triton.jit(do_not_specialize=["N"])
def conv1x1_maxpool_backward(
    x, weight, argmax, dout, dx, dweight, dbias, N, rows,
    H: constexpr, W: constexpr, C: constexpr, K: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """dx (M, C), and each program's share of the gradients of weight and bias."""
    M = N * H * W // 4
    first, blocks = share_of_blocks(M, BLOCK)
    c, k = tl.arange(0, C), tl.arange(0, max(K, 16))
    DTYPE: constexpr = x.dtype.element_ty
    filters = tl.load(weight + k[:, None] * C + c[None, :], (k < K)[:, None], 0.0).to(DTYPE)
    acc, dadded = tl.zeros([max(K, 16), C], tl.float32), tl.zeros([max(K, 16)], tl.float32)
    for i in range(blocks):
        m = first + i * BLOCK + tl.arange(0, BLOCK)
        corner, valid = corner_of(m, H, W), (m < M)[:, None]
        at, mask = m[:, None] * K + k[None, :], valid & (k < K)[None, :]
        gradients, place = tl.load(dout + at, mask, 0.0), tl.load(argmax + at, mask, 0)
        dadded += tl.sum(gradients.to(tl.float32), 0)
        for corner_pixel in tl.static_range(4):
            at = (corner + corner_pixel // 2 * W + corner_pixel % 2)[:, None] * C + c[None, :]
            dz = tl.where(place == corner_pixel, gradients, 0.0).to(DTYPE)
            tl.store(dx + at, tl.dot(dz, filters), valid)
            acc = tl.dot(tl.trans(dz), tl.load(x + at, valid, 0.0), acc)
    at = tl.program_id(0) * rows
    tl.store(dweight + at + k[:, None] * C + c[None, :], acc, (k < K)[:, None])
    tl.store(dbias + at + k, dadded, k < K)


@triton.jit
def corner_of(m, H, W):
    """Returns the first of the four pixels that the pooled pixel m is made of."""
    return m // (W // 2) * 2 * W + m % (W // 2) * 2


# ------------------------------------------------ average pooling, linear layer and cross-entropy


@triton.jit(do_not_specialize=["N"])
def avgpool_linear_loss(
    x, weight, bias, labels, dx, dweight, dbias, loss, correct, N, rows,
    HW: constexpr, C: constexpr, K: constexpr, CLASSES: constexpr, PIXELS: constexpr,
):  # fmt: skip
    """Writes dx, and each program's share of the mean cross-entropy, its gradients and the number of correct images.

    labels: int64 (N,). One that is no class makes the loss NaN. K is a power of two, at least CLASSES.
    """
    c, k, pixel = tl.arange(0, C), tl.arange(0, K), tl.arange(0, PIXELS)
    DTYPE: constexpr = x.dtype.element_ty
    known = k < CLASSES
    filters = tl.load(weight + k[:, None] * C + c[None, :], known[:, None], 0.0).to(DTYPE).to(tl.float32)
    added = tl.load(bias + k, known, 0.0).to(DTYPE).to(tl.float32)
    acc, dadded = tl.zeros([K, C], tl.float32), tl.zeros([K], tl.float32)
    losses, hits = 0.0, 0.0
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        at, mask = n * HW * C + pixel[:, None] * C + c[None, :], (pixel < HW)[:, None]
        mean = (tl.sum(tl.load(x + at, mask, 0.0).to(tl.float32), 0) / HW).to(DTYPE).to(tl.float32)
        z = (tl.sum(filters * mean[None, :], 1) + added).to(DTYPE).to(tl.float32)
        label = tl.load(labels + n)
        z = tl.where(known, z, -float("inf"))
        hits += (tl.argmax(z, 0) == label).to(tl.float32)
        z -= tl.max(z, 0)
        total = tl.sum(tl.exp(z), 0)
        loss_of_image = tl.log(total) - tl.sum(tl.where(k == label, z, 0.0), 0)
        losses += tl.where((label >= 0) & (label < CLASSES), loss_of_image, float("nan")) / N
        dlogits = (tl.exp(z) / total - (k == label).to(tl.float32)) / N
        acc += dlogits[:, None] * mean[None, :]
        dadded += dlogits
        gradients = tl.sum(filters * dlogits[:, None], 0) / HW
        gradients = tl.broadcast_to(gradients[None, :], [PIXELS, C])
        tl.store(dx + at, gradients, mask)
    at = tl.program_id(0) * rows
    tl.store(dweight + at + k[:, None] * C + c[None, :], acc, known[:, None])
    tl.store(dbias + at + k, dadded, known)
    tl.store(loss + at, losses)
    tl.store(correct + at, hits)


# ------------------------------------------------------------------------------- sums of shares


@triton.jit
def sum_shares(shares, total, rows, SHARES: constexpr, BLOCK: constexpr):
    """total (rows,) = the sum of the SHARES rows of shares."""
    column, p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, SHARES)
    mask = column < rows
    tl.store(total + column, tl.sum(tl.load(shares + p[:, None] * rows + column[None, :], mask[None, :], 0.0), 0), mask)
