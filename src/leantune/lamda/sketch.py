"""Leading singular directions of matrices that are only ever seen as a stream, in two passes over it.

Randomised range finding (Halko, Martinsson, Tropp 2011): the first pass multiplies by a random matrix, an
orthonormal basis Q of the result holds nearly all that matters, the second pass projects onto Q. Nothing of
size d_out x d_in is ever made, and both passes take one batch after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Directions sampled for each one that is wanted, and a few more. There is no power iteration, which would
# cost two passes more, so there is plenty of room instead; it costs next to nothing.
_FACTOR, _OVERSAMPLE = 2, 8


class Triplets(NamedTuple):
    """Leading singular triplets, in descending order. `U` is None for a matrix that has no left side here."""

    U: Tensor | None  # (d_out, r)
    sigma: Tensor  # (r,)
    V: Tensor  # (d_in, r)


class Sketch:
    """What both kinds have in common.

    Args:
        r: Directions wanted, at most `d_in` (and d_out, for gradients).
        d_in: Length of x.
        largest: Width at which the sketch is the whole matrix.
        generator: Of the random matrix, on the CPU.
        like: A tensor of the dtype and on the device to work in.
    """

    def __init__(self, r: int, d_in: int, largest: int, generator: torch.Generator, like: Tensor) -> None:
        width = min(_FACTOR * r + _OVERSAMPLE, largest)
        self.r = r
        self.random = torch.randn(d_in, width, generator=generator, dtype=torch.float64).to(like)  # Omega
        self.total: Tensor | None = None
        self.basis: Tensor | None = None  # Q, from the end of the first pass on

    def _add(self, part: Tensor) -> None:
        self.total = part if self.total is None else self.total + part

    def end_pass(self) -> None:
        """After the first pass: find the basis for the second. After the second: nothing."""
        if self.basis is None:
            assert self.total is not None
            self.basis, self.total = torch.linalg.qr(self.total)[0], None

    @property
    def seen(self) -> bool:
        """Whether anything but zeros (and nothing but finite numbers) has come by in this pass."""
        return self.total is not None and bool(torch.isfinite(self.total).all()) and bool(self.total.any())


class InputSketch(Sketch):
    """The r leading directions of inputs x: eigenvectors of sum x x^T (uncentred)."""

    def add(self, x: Tensor) -> None:
        """Take in rows x, (n, d_in)."""
        x = x.to(self.random)
        if self.basis is None:
            self._add(x.T @ (x @ self.random))  # (d_in, width)
        else:
            z = (x @ self.basis).double()  # (n, width); squares of small numbers need the digits
            self._add(z.T @ z)

    def triplets(self) -> Triplets:
        """V and sigma, the root of the sum of squares along each direction."""
        assert self.total is not None and self.basis is not None
        values, vectors = torch.linalg.eigh(self.total)  # ascending
        vectors = vectors.flip(1)[:, : self.r].to(self.basis)
        return Triplets(
            None, values.flip(0)[: self.r].clamp_min(0).sqrt().to(self.basis), self.basis @ vectors
        )


class GradientSketch(Sketch):
    """The r leading singular triplets of G = dL/dW = sum dy x^T."""

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Take in a layer's inputs (n, d_in) with the gradients of its outputs (n, d_out)."""
        x, grad = x.to(self.random), grad.to(self.random)
        if self.basis is None:
            self._add(grad.T @ (x @ self.random))  # (d_out, width)
        else:
            self._add((grad @ self.basis).T @ x)  # (width, d_in)

    def triplets(self) -> Triplets:
        """U, sigma and V of G."""
        assert self.total is not None and self.basis is not None
        U, sigma, Vh = torch.linalg.svd(self.total, full_matrices=False)
        return Triplets(self.basis @ U[:, : self.r], sigma[: self.r], Vh[: self.r].T)
