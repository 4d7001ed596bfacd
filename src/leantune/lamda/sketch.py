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

    basis: Tensor | None  # Q, from the end of the first pass on

    def __init__(self, r: int, d_in: int, largest: int, generator: torch.Generator, like: Tensor) -> None:
        width = min(_FACTOR * r + _OVERSAMPLE, largest)
        self.r, self.basis = r, None
        self.random = torch.randn(d_in, width, generator=generator, dtype=torch.float64).to(like)  # Omega
        self.total = self._empty()  # of the pass that goes on; processes may add theirs up

    def _empty(self) -> Tensor:
        raise NotImplementedError

    def end_pass(self) -> None:
        """After the first pass: find the basis for the second. After the second: nothing."""
        if self.basis is None:
            self.basis = torch.linalg.qr(self.total)[0]
            self.total = self._empty()

    @property
    def seen(self) -> bool:
        """Whether anything but zeros (and nothing but finite numbers) has come by in this pass."""
        return bool(torch.isfinite(self.total).all()) and bool(self.total.any())


class InputSketch(Sketch):
    """The r leading directions of inputs x: eigenvectors of sum x x^T (uncentred)."""

    def __init__(self, r: int, d_in: int, generator: torch.Generator, like: Tensor) -> None:
        super().__init__(r, d_in, d_in, generator, like)

    def _empty(self) -> Tensor:
        d_in, width = self.random.shape
        if self.basis is None:
            return self.random.new_zeros(d_in, width)
        return self.random.new_zeros(width, width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take in rows x, (n, d_in)."""
        x = x.to(self.random)
        if self.basis is None:
            self.total += x.T @ (x @ self.random)  # (d_in, width)
        else:
            z = (x @ self.basis).double()  # (n, width); squares of small numbers need the digits
            self.total += z.T @ z

    def triplets(self) -> Triplets:
        """V and sigma, the root of the sum of squares along each direction."""
        assert self.basis is not None
        values, vectors = torch.linalg.eigh(self.total)  # ascending
        vectors = vectors.flip(1)[:, : self.r].to(self.basis)
        return Triplets(
            None, values.flip(0)[: self.r].clamp_min(0).sqrt().to(self.basis), self.basis @ vectors
        )


class GradientSketch(Sketch):
    """The r leading singular triplets of G = dL/dW = sum dy x^T."""

    def __init__(self, r: int, d_in: int, d_out: int, generator: torch.Generator, like: Tensor) -> None:
        self.d_out = d_out
        super().__init__(r, d_in, min(d_in, d_out), generator, like)

    def _empty(self) -> Tensor:
        d_in, width = self.random.shape
        return self.random.new_zeros(*((self.d_out, width) if self.basis is None else (width, d_in)))

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Take in a layer's inputs (n, d_in) with the gradients of its outputs (n, d_out)."""
        x, grad = x.to(self.random), grad.to(self.random)
        if self.basis is None:
            self.total += grad.T @ (x @ self.random)  # (d_out, width)
        else:
            self.total += (grad @ self.basis).T @ x  # (width, d_in)

    def triplets(self) -> Triplets:
        """U, sigma and V of G."""
        assert self.basis is not None
        U, sigma, Vh = torch.linalg.svd(self.total, full_matrices=False)
        return Triplets(self.basis @ U[:, : self.r], sigma[: self.r], Vh[: self.r].T)
