"""Where the fixed factors A, S0 and B0 of a LaMDA adapter come from: the spectrum of the weight."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from leantune.lamda.config import LamdaConfig

# Below this size a full SVD costs less than a second or so and is exact.
_FULL_SVD_SIDE = 256
# Extra directions sampled by the randomised SVD; the usual choice, makes the last of the r vectors good.
_OVERSAMPLE = 8


class Spectrum(NamedTuple):
    """Leading singular triplets of a weight, in descending order; float32 (float64 if the weight is)."""

    U: Tensor | None  # (d_out, k); None where nobody needs it
    sigma: Tensor  # (k,)
    V: Tensor | None  # (d_in, k); None where nobody needs it


class Factors(NamedTuple):
    """The fixed part of one adapted layer: float32, columns of B0 and rows of A in the order of freezing."""

    A: Tensor  # (r, d_in)
    S0: Tensor  # (r,): the diagonal
    B0: Tensor  # (d_out, r)


def initial_factors(weight: Tensor, r: int, config: LamdaConfig, spectrum: Spectrum | None = None) -> Factors:
    """Compute A, S0 and B0 of one layer; METHODS 1, "Initialisation".

    The result depends on the weight, the rank and the config alone: the global random state is neither
    read nor moved.

    Args:
        weight: (d_out, d_in), any floating dtype. It is not changed.
        r: Rank, at most min(d_out, d_in).
        config: `init`, `init_scale`, `freeze_order`, `spectral_ranks`, `svd_seed` and `svd_iterations` are
            read.
        spectrum: From `leading_spectrum` on the same weight and config, if it is known already.

    Returns:
        `Factors`, contiguous and in float32 (float64 if the weight is), on the weight's device.
    """
    W = weight.detach()
    with torch.no_grad(), seeded(config.svd_seed, W.device):
        nothing = W.new_empty(0, 0, dtype=_wide_dtype(W))
        U, sigma, V = nothing, nothing, nothing
        if config.init == "smallest":
            U, sigma, V = _smallest(_wide(W), r)
        elif needs_spectrum(config):
            known = spectrum or leading_spectrum(W, r, config)
            sigma = known.sigma[:r]
            if config.init == "svd":
                V = cast(Tensor, known.V)[:, :r]
                U = U if known.U is None else known.U[:, :r]
        if config.init in ("random", "orthogonal"):
            U, V = _random(W, r, orthonormal=config.init == "orthogonal")
        sigma = sigma if config.init_scale != "identity" else torch.ones(r, dtype=V.dtype, device=V.device)
        return arranged(U, sigma, V, config)


def arranged(U: Tensor, sigma: Tensor, V: Tensor, config: LamdaConfig) -> Factors:
    """Singular triplets as factors, the diagonal scaled and all in the order of freezing.

    Args:
        U: (d_out, r), or with no columns.
        sigma: (r,), descending.
        V: (d_in, r).
        config: `init_scale` and `freeze_order` are read.
    """
    S0 = _scaled(sigma, config.init_scale)
    if config.freeze_order == "smallest":
        U, S0, V = U.flip(1), S0.flip(0), V.flip(1)
    # The SVD returns column-major matrices; a copy read back from a file is row-major, and matrix
    # products of the two differ in the last bit. Row-major from the beginning.
    return Factors(A=V.T.contiguous(), S0=S0.contiguous(), B0=U.contiguous())


def needs_spectrum(config: LamdaConfig) -> bool:
    """Whether the factors come from the leading singular triplets of the weight."""
    if config.init == "svd":
        return True
    return config.init in ("random", "orthogonal") and config.init_scale != "identity"


def leading_spectrum(weight: Tensor, r: int, config: LamdaConfig) -> Spectrum:
    """The leading singular triplets of a weight, at least r of them (all, if it has no more).

    With `spectral_ranks`, and if the factors come from here, there are as many as the largest choice,
    whatever r is, so that one decomposition serves both the scores and the factors of every rank. Seeded; the
    global random state is left alone.

    Args:
        weight: (d_out, d_in), any floating dtype.
        r: Rank that is wanted.
        config: `spectral_ranks`, `svd_seed` and `svd_iterations` are read.
    """
    width = r
    if config.spectral_ranks is not None and needs_spectrum(config):
        width = max(r, *(config.spectral_ranks.choices or ()))
    width = min(width, *weight.shape)
    W = _wide(weight)
    with torch.no_grad(), seeded(config.svd_seed, W.device):
        return Spectrum(*_largest(W, width, config.svd_iterations))


def energy_score(weight: Tensor, sigma: Tensor, r: int) -> float:
    """E(r) = (sum of the r largest sigma_i^2) / ||W||_F^2, in [0, 1]; METHODS 1, "LaMDA++".

    Args:
        weight: W.
        sigma: Its singular values in descending order, at least r of them or all.
        r: At which rank; above the size of W: at its size.

    Returns:
        The score; 1 for a weight of zeros, of which any rank has everything.
    """
    whole = torch.linalg.vector_norm(_wide(weight)).item() ** 2
    return min(1.0, sigma[:r].double().square().sum().item() / whole) if whole else 1.0


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(_wide_dtype(weight))


def _wide_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _largest(W: Tensor, r: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets: U (d_out, r), sigma (r,), V (d_in, r)."""
    side = min(W.shape)
    if side <= _FULL_SVD_SIDE or r + _OVERSAMPLE >= side:
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        return _signed(U[:, :r], sigma[:r], Vh[:r].T)
    U, sigma, V = torch.svd_lowrank(W, q=r + _OVERSAMPLE, niter=iterations)
    return _signed(U[:, :r], sigma[:r], V[:, :r])


def _smallest(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r last singular triplets, in descending order."""
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    return _signed(U[:, -r:], sigma[-r:], Vh[-r:].T)


def _signed(U: Tensor, sigma: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fix the signs, which an SVD leaves open: the largest entry of each right vector is positive."""
    at = V.abs().argmax(dim=0, keepdim=True)  # (1, r)
    sign = torch.where(V.gather(0, at) < 0, -1.0, 1.0).to(V.dtype)
    return U * sign, sigma, V * sign


def _random(W: Tensor, r: int, *, orthonormal: bool) -> tuple[Tensor, Tensor]:
    """Random U (d_out, r) and V (d_in, r) whose columns have length 1 (in the mean, if not orthonormal)."""
    d_out, d_in = W.shape
    U = torch.randn(d_out, r, dtype=_wide_dtype(W), device=W.device)
    V = torch.randn(d_in, r, dtype=_wide_dtype(W), device=W.device)
    if orthonormal:
        return torch.linalg.qr(U)[0], torch.linalg.qr(V)[0]
    return U / d_out**0.5, V / d_in**0.5


def _scaled(sigma: Tensor, scale: str) -> Tensor:
    if scale == "identity":
        return torch.ones_like(sigma)
    if scale == "spectrum":
        return sigma
    mean = sigma.mean()
    # A weight of zeros (a freshly initialised gate, for example) has no spectrum to speak of.
    return torch.where(
        mean > 0, sigma / mean.clamp_min(torch.finfo(sigma.dtype).tiny), torch.ones_like(sigma)
    )


class seeded:  # noqa: N801 - used like a function
    """`torch.random.fork_rng` for one device, seeded inside."""

    def __init__(self, seed: int, device: torch.device) -> None:
        accelerator = device.type not in ("cpu", "meta")
        devices = [device] if accelerator else []
        self.seed = seed
        self.fork = torch.random.fork_rng(devices=devices, device_type=device.type if accelerator else "cuda")

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)
