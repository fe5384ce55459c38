"""Parameters and multiplications of published networks, block by block, from their papers.

VGG-16: Simonyan & Zisserman, arXiv:1409.1556, configuration D. ResNet-101: He et al.,
arXiv:1512.03385. Inception V3: Szegedy et al., arXiv:1512.00567, without the auxiliary head, as
tf_cnn_benchmarks trains it.
"""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """A layer, or a block of some.

    Attributes:
        parameters: Values that are trained.
        multiplications: For an image, forward.
    """

    parameters: int
    multiplications: int


def _convolution(inputs: int, outputs: int, size: int, *, height: int = 0, kernel: int) -> Layer:
    """Return a convolution of height x kernel (or a square) to size x size, and its norm."""
    weights = inputs * outputs * (height or kernel) * kernel
    return Layer(weights + 2 * outputs, weights * size**2)


def _block(*layers: Layer) -> Layer:
    return Layer(*map(sum, zip(*layers, strict=True)))


def vgg16() -> list[Layer]:
    """Return the layers of VGG-16, 138,357,544 parameters; no norms, but biases."""
    layers, inputs, size = [], 3, 224
    for count, outputs in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(count):
            weights = 9 * inputs * outputs
            layers.append(Layer(weights + outputs, weights * size**2))
            inputs = outputs
        size //= 2
    for inputs, outputs in ((7 * 7 * 512, 4096), (4096, 4096), (4096, 1000)):
        layers.append(_linear(inputs, outputs))
    return layers


def _linear(inputs: int, outputs: int) -> Layer:
    return Layer((inputs + 1) * outputs, inputs * outputs)


def resnet101() -> list[Layer]:
    """Return the blocks of ResNet-101, 44,549,160 parameters."""
    layers, inputs, size = [_convolution(3, 64, 112, kernel=7)], 64, 56
    for stage, blocks in enumerate((3, 4, 23, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            if stage and not block:
                size //= 2
            parts = [
                _convolution(inputs, width, size, kernel=1),
                _convolution(width, width, size, kernel=3),
                _convolution(width, 4 * width, size, kernel=1),
            ]
            if not block:
                parts.append(_convolution(inputs, 4 * width, size, kernel=1))
            layers.append(_block(*parts))
            inputs = 4 * width
    return [*layers, _linear(2048, 1000)]


def inception3() -> list[Layer]:
    """Return the blocks of Inception V3, 23,834,568 parameters."""

    def chain(size: int, *steps: tuple[int, ...]) -> list[Layer]:
        """Convolutions one after the other: (inputs, outputs, kernel[, height])."""
        return [
            _convolution(i, o, size, kernel=kernel, height=height[0] if height else 0)
            for i, o, kernel, *height in steps
        ]

    layers = [
        *chain(149, (3, 32, 3)),
        *chain(147, (32, 32, 3), (32, 64, 3)),
        *chain(73, (64, 80, 1)),
        *chain(71, (80, 192, 3)),
    ]
    inputs = 192
    for pool in (32, 64, 64):
        branches = chain(35, (inputs, 64, 1), (inputs, 48, 1), (48, 64, 5), (inputs, pool, 1))
        branches += chain(35, (inputs, 64, 1), (64, 96, 3), (96, 96, 3))
        layers.append(_block(*branches))
        inputs = 224 + pool
    smaller = chain(17, (288, 384, 3), (96, 96, 3)) + chain(35, (288, 64, 1), (64, 96, 3))
    layers.append(_block(*smaller))
    for width in (128, 160, 160, 192):
        branches = chain(17, (768, 192, 1), (768, 192, 1))
        branches += chain(17, (768, width, 1), (width, width, 1, 7), (width, 192, 7, 1))
        branches += chain(17, (768, width, 1), *[(width, width, 1, 7)] * 3, (width, 192, 1, 7))
        layers.append(_block(*branches))
    smaller = chain(17, (768, 192, 1), (768, 192, 1), (192, 192, 1, 7), (192, 192, 7, 1))
    smaller += chain(8, (192, 320, 3), (192, 192, 3))
    layers.append(_block(*smaller))
    for inputs in (1280, 2048):
        branches = chain(8, (inputs, 320, 1), (inputs, 192, 1))
        branches += chain(8, (inputs, 384, 1), *[(384, 384, 1, 3)] * 2)
        branches += chain(8, (inputs, 448, 1), (448, 384, 3), *[(384, 384, 1, 3)] * 2)
        layers.append(_block(*branches))
    return [*layers, _linear(2048, 1000)]


NETWORKS = {"Inception V3": inception3(), "ResNet-101": resnet101(), "VGG-16": vgg16()}
