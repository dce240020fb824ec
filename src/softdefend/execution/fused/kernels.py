"""Triton kernels: 3x3 convolutions whose neighbors in a residual network are part of the same kernel.

A convolution here is a sum of matrix products, one for each of its nine taps, between windows of the image
and slices of the weights; both are fetched by the tensor memory accelerator of Hopper GPUs, which also
supplies the zeros beyond the border. What follows in the network (bias, residual, ReLU; in the backward pass
the ReLU's mask) is applied before anything is written. Activations are [b, h, w, c] in bfloat16, sums are in
float32.

Weights are [outputs, 9 inputs], tap by tap, row by row of the 3x3 window. The gradient in the image is the
same sum with taps in reverse and the weights read across.

Sums are kept as [columns, pixels], weights first. Triton takes the second operand of a product from shared
memory, but a first one that has been reshaped from registers, and Triton 3.6 writes the next portion into
these while products may still read them (triton-lang/triton#9433): sums are then wrong, now and then.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def convolve(
    x,
    w,
    side,
    w_side,
    out,
    second,
    other,
    active,
    bias,
    scale,
    height,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    side_inputs: tl.constexpr,
    side_pairs: tl.constexpr,
    images: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    backward: tl.constexpr,
):
    """Stride 1. A program makes [images, rows, width, columns] of ``out``, in portions of ``depth`` channels.

    Forward: v = conv(x, w) + side w_side + other + bias, each part if there is one. ``out`` is relu(v); with
    ``second``, it is v, and ``second`` is relu(scale v + bias). With ``side_pairs``, ``side`` is
    [b, height, 2, width, 2 side_inputs], of which the even pixels count: the image of a strided 1x1
    convolution.
    Backward, ``x`` and ``side`` being gradients: v = conv(x, w reversed) + side w_side, and ``out`` is v +
    other where ``active`` > 0; with ``scale`` it is other, plus scale v where ``active`` > 0.
    """
    pixels: tl.constexpr = images * rows * width
    across: tl.constexpr = (outputs + columns - 1) // columns
    portions: tl.constexpr = (inputs + depth - 1) // depth
    program = tl.program_id(0)
    first = (program % across) * columns
    tile = program // across
    image = tile // (height // rows) * images
    row = tile % (height // rows) * rows
    total = tl.zeros([columns, pixels], dtype=tl.float32)
    for turn in range(9 * portions):
        tap = turn // portions
        channel = turn % portions * depth
        a = x.load([image, row + tap // 3 - 1, tap % 3 - 1, channel]).reshape(pixels, depth)
        if backward:
            total = tl.dot(w.load([channel, (8 - tap) * outputs + first]).T, a.T, total)
        else:
            total = tl.dot(w.load([first, tap * inputs + channel]), a.T, total)
    if side_inputs > 0:
        for channel in range(0, side_inputs, depth):
            if side_pairs:
                a = side.load([image, row, 0, 0, channel]).reshape(pixels, depth)
            else:
                a = side.load([image, row, 0, channel]).reshape(pixels, depth)
            if backward:
                total = tl.dot(w_side.load([channel, first]).T, a.T, total)
            else:
                total = tl.dot(w_side.load([first, channel]), a.T, total)
    total = total.T
    place = [image, row, 0, first]
    column = first + tl.arange(0, columns)
    if backward:
        if scale is None:
            if other is not None:
                total += other.load(place).reshape(pixels, columns).to(tl.float32)
            total = tl.where(active.load(place).reshape(pixels, columns) > 0, total, 0.0)
        else:
            total *= tl.load(scale + column, mask=column < outputs)[None, :]
            total = tl.where(active.load(place).reshape(pixels, columns) > 0, total, 0.0)
            if other is not None:
                total += other.load(place).reshape(pixels, columns).to(tl.float32)
    else:
        if other is not None:
            total += other.load(place).reshape(pixels, columns).to(tl.float32)
        if second is None:
            total = tl.maximum(total + tl.load(bias + column, mask=column < outputs)[None, :], 0.0)
        else:
            scaled = total * tl.load(scale + column, mask=column < outputs)[None, :]
            scaled = tl.maximum(scaled + tl.load(bias + column, mask=column < outputs)[None, :], 0.0)
            second.store(place, scaled.to(out.dtype).reshape(images, rows, width, columns))
    out.store(place, total.to(out.dtype).reshape(images, rows, width, columns))


@triton.jit
def convolve_strided(
    x,
    w,
    out,
    bias,
    height,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    images: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
):
    """Stride 2: relu(conv(x, w) + bias). ``x`` is [b, height, 2, width, 2 inputs]; height and width are those
    of ``out``; ``depth`` divides ``inputs``."""
    pixels: tl.constexpr = images * rows * width
    across: tl.constexpr = (outputs + columns - 1) // columns
    portions: tl.constexpr = (inputs + depth - 1) // depth
    program = tl.program_id(0)
    first = (program % across) * columns
    tile = program // across
    image = tile // (height // rows) * images
    row = tile % (height // rows) * rows
    total = tl.zeros([columns, pixels], dtype=tl.float32)
    for turn in range(9 * portions):
        tap = turn // portions
        channel = turn % portions * depth
        # Taps -1, 0, 1 around pixel 2 i are the odd pixel of pair i - 1, the even and the odd one of pair i.
        down, right = tap // 3, tap % 3
        place = [
            image,
            row + (down + 1) // 2 - 1,
            (down + 1) % 2,
            (right + 1) // 2 - 1,
            (right + 1) % 2 * inputs + channel,
        ]
        a = x.load(place).reshape(pixels, depth)
        total = tl.dot(w.load([first, tap * inputs + channel]), a.T, total)
    total = total.T
    column = first + tl.arange(0, columns)
    total += tl.load(bias + column, mask=column < outputs)[None, :]
    total = tl.maximum(total, 0.0)
    out.store([image, row, 0, first], total.to(out.dtype).reshape(images, rows, width, columns))


@triton.jit
def gradient_strided(
    grad,
    w,
    side,
    w_side,
    out,
    active,
    scale,
    height,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    images: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
):
    """Gradient in the image of a 3x3 and a 1x1 convolution of stride 2, where ``active`` > 0, times ``scale``
    if there is one.

    ``out`` and ``active`` are [b, height, 2, width, 2 outputs], ``grad`` and ``side`` (of the 1x1) are
    [b, height, width, inputs]; ``columns`` divides ``outputs``. Pixels of the four parities meet 1, 2, 2 and
    4 of the nine taps: a program makes one parity, those with most taps first.
    """
    pixels: tl.constexpr = images * rows * width
    across: tl.constexpr = (outputs + columns - 1) // columns
    portions: tl.constexpr = (inputs + depth - 1) // depth
    each = tl.num_programs(0) // 4
    parity = 3 - tl.program_id(0) // each
    odd_row, odd_column = parity // 2, parity % 2
    program = tl.program_id(0) % each
    first = (program % across) * columns
    tile = program // across
    image = tile // (height // rows) * images
    row = tile % (height // rows) * rows
    total = tl.zeros([columns, pixels], dtype=tl.float32)
    for turn in range((1 + odd_row) * (1 + odd_column) * portions):
        number = turn // portions
        channel = turn % portions * depth
        below, beside = number // (1 + odd_column), number % (1 + odd_column)
        # An even pixel meets the middle tap; an odd one the first tap of the next and the last of its pair.
        tap = (1 - odd_row + 2 * odd_row * below) * 3 + 1 - odd_column + 2 * odd_column * beside
        place = [image, row + odd_row * (1 - below), odd_column * (1 - beside), channel]
        a = grad.load(place).reshape(pixels, depth)
        total = tl.dot(w.load([channel, tap * outputs + first]).T, a.T, total)
    if parity == 0:
        for channel in range(0, inputs, depth):
            a = side.load([image, row, 0, channel]).reshape(pixels, depth)
            total = tl.dot(w_side.load([channel, first]).T, a.T, total)
    total = total.T
    if scale is not None:
        total *= tl.load(scale + first + tl.arange(0, columns))[None, :]
    place = [image, row, odd_row, 0, odd_column * outputs + first]
    total = tl.where(active.load(place).reshape(pixels, columns) > 0, total, 0.0)
    out.store(place, total.to(out.dtype).reshape(images, rows, 1, width, columns))


@triton.jit
def stem(
    image,
    mean,
    std,
    w,
    scale,
    bias,
    out,
    second,
    count,
    height,
    width,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    channels: tl.constexpr,
    padded: tl.constexpr,
    outputs: tl.constexpr,
    pixels: tl.constexpr,
):
    """v = conv((image - mean) / std) of a float32 image with few channels. ``out`` is relu(v + bias); with
    ``second``, it is v, and ``second`` is relu(scale v + bias).

    ``w`` is [padded, outputs]: 9 channels rows, tap by tap, then zeros.
    """
    pixel = tl.program_id(0) * pixels + tl.arange(0, pixels)
    term = tl.arange(0, padded)
    tap, channel = term // channels, term % channels
    number, row, column = pixel // (height * width), pixel // width % height, pixel % width
    y, x = row[:, None] + (tap // 3 - 1)[None, :], column[:, None] + (tap % 3 - 1)[None, :]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    inside = inside & (tap < 9)[None, :] & (pixel < count)[:, None]
    place = number[:, None] * stride_image + channel[None, :] * stride_channel + y * stride_row
    value = tl.load(image + place + x * stride_column, mask=inside, other=0.0)
    center, unit = tl.load(mean + channel)[None, :], tl.load(std + channel)[None, :]
    value = tl.where(inside, (value - center) / unit, 0.0).to(w.dtype.element_ty)
    output = tl.arange(0, outputs)
    total = tl.dot(value, tl.load(w + term[:, None] * outputs + output[None, :]))
    place = pixel[:, None].to(tl.int64) * outputs + output[None, :]
    if second is None:
        total = tl.maximum(total + tl.load(bias + output)[None, :], 0.0)
    else:
        scaled = total * tl.load(scale + output)[None, :] + tl.load(bias + output)[None, :]
        scaled = tl.maximum(scaled, 0.0).to(out.dtype.element_ty)
        tl.store(second + place, scaled, mask=(pixel < count)[:, None])
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(pixel < count)[:, None])


@triton.jit
def stem_taps(
    grad,
    w,
    out,
    count,
    padded: tl.constexpr,
    outputs: tl.constexpr,
    pixels: tl.constexpr,
):
    """What each pixel of ``grad`` [count, outputs] gives to each term of its window: ``out`` [count, padded]
    float32."""
    pixel = tl.program_id(0) * pixels + tl.arange(0, pixels)
    term, output = tl.arange(0, padded), tl.arange(0, outputs)
    there = (pixel < count)[:, None]
    a = tl.load(grad + pixel[:, None].to(tl.int64) * outputs + output[None, :], mask=there, other=0.0)
    total = tl.dot(a, tl.load(w + term[None, :] * outputs + output[:, None]))
    tl.store(out + pixel[:, None].to(tl.int64) * padded + term[None, :], total, mask=there)


@triton.jit
def stem_gradient(
    taps,
    std,
    out,
    count,
    height,
    width,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    channels: tl.constexpr,
    padded: tl.constexpr,
    pixels: tl.constexpr,
):
    """Gradient in the image [b, c, h, w] float32: the sum of what the windows over each pixel give it."""
    value = tl.program_id(0) * pixels + tl.arange(0, pixels)
    pixel, channel = value // channels, value % channels
    number, row, column = pixel // (height * width), pixel // width % height, pixel % width
    total = tl.zeros([pixels], dtype=tl.float32)
    for tap in tl.static_range(9):
        y, x = row - (tap // 3 - 1), column - (tap % 3 - 1)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (pixel < count)
        source = ((number * height + y) * width + x).to(tl.int64)
        total += tl.load(taps + source * padded + tap * channels + channel, mask=inside, other=0.0)
    place = number * stride_image + channel * stride_channel + row * stride_row + column * stride_column
    tl.store(out + place, total / tl.load(std + channel), mask=pixel < count)


@triton.jit
def head(
    active,
    weight,
    bias,
    out,
    area,
    classes,
    channels: tl.constexpr,
    padded: tl.constexpr,
    together: tl.constexpr,
):
    """Mean over pixels and linear layer, float32: ``active`` [b, h, w, channels] to ``out`` [b, classes]. A
    program makes one image, ``together`` classes at a time; ``padded`` >= channels is a power of two."""
    image, channel = tl.program_id(0).to(tl.int64), tl.arange(0, padded)
    there = channel < channels
    total = tl.zeros([padded], dtype=tl.float32)
    for pixel in range(area):
        total += tl.load(active + (image * area + pixel) * channels + channel, mask=there, other=0.0)
    mean = (total / area)[None, :]
    for first in range(0, classes, together):
        k = first + tl.arange(0, together)
        place = weight + k[:, None] * channels + channel[None, :]
        row = tl.load(place, mask=(k < classes)[:, None] & there[None, :], other=0.0)
        logit = tl.sum(row * mean, axis=1) + tl.load(bias + k, mask=k < classes, other=0.0)
        tl.store(out + image * classes + k, logit, mask=k < classes)


@triton.jit
def head_gradient(
    grad,
    weight,
    active,
    scale,
    out,
    area,
    classes,
    channels: tl.constexpr,
    padded: tl.constexpr,
    together: tl.constexpr,
):
    """Back through the linear layer, the mean and the ReLU, times ``scale`` if there is one: ``grad``
    [b, classes] float32, ``active`` and ``out`` [b, h, w, channels]."""
    image, channel = tl.program_id(0).to(tl.int64), tl.arange(0, padded)
    there = channel < channels
    share = tl.zeros([padded], dtype=tl.float32)
    for first in range(0, classes, together):
        k = first + tl.arange(0, together)
        place = weight + k[:, None] * channels + channel[None, :]
        row = tl.load(place, mask=(k < classes)[:, None] & there[None, :], other=0.0)
        share += tl.sum(
            row * tl.load(grad + image * classes + k, mask=k < classes, other=0.0)[:, None], axis=0
        )
    share = share / area
    if scale is not None:
        share *= tl.load(scale + channel, mask=there, other=0.0)
    for pixel in range(area):
        place = (image * area + pixel) * channels + channel
        passed = tl.where(tl.load(active + place, mask=there, other=0.0) > 0, share, 0.0)
        tl.store(out + place, passed.to(out.dtype.element_ty), mask=there)


@triton.jit
def fold(
    w,
    weight,
    shift,
    mean,
    variance,
    eps,
    out,
    bias,
    row: tl.constexpr,
    stride_output,
    stride_term,
    values: tl.constexpr,
):
    """A convolution [outputs, row] and the normalization behind it, if there is one, as one convolution with
    a bias. Element (o, t) of ``out`` stands at o stride_output + t stride_term."""
    output = tl.program_id(0)
    term = tl.program_id(1) * values + tl.arange(0, values)
    there = term < row
    value = tl.load(w + output * row + term, mask=there)
    if weight is not None:
        scale = tl.load(weight + output) / tl.sqrt(tl.load(variance + output) + eps)
        value *= scale
        tl.store(bias + output, tl.load(shift + output) - tl.load(mean + output) * scale)
    place = output * stride_output + term * stride_term
    tl.store(out + place, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def move(image, adversarial, grad, out, step_size, eps, count, values: tl.constexpr):
    """A signed step of ``adversarial``, cut to ``eps`` around ``image`` and to [0, 1]; float32, one order in
    memory."""
    place = tl.program_id(0) * values + tl.arange(0, values)
    there = place < count
    center, slope = tl.load(image + place, mask=there), tl.load(grad + place, mask=there)
    sign = tl.where(slope > 0, 1.0, 0.0) - tl.where(slope < 0, 1.0, 0.0)
    moved = tl.load(adversarial + place, mask=there) + step_size * sign
    moved = tl.minimum(tl.maximum(moved, center - eps), center + eps)
    tl.store(out + place, tl.minimum(tl.maximum(moved, 0.0), 1.0), mask=there)
