"""Noise of weights as few rows of inputs see it, without the noisy weights.

A product with weights ``W + s E``, E (O, I) of independent standard normal values, s for each
output, needs of E no more than what its N rows of inputs read of it, and its backward no more than
what N rows of gradients read. With the factors ``x^T = Q R``, Q (I, N) of orthonormal columns:

    forward   x E^T = R^T Z                            Z = Q^T E^T, (N, O)
    backward  g E   = (g Z^T) Q^T + L H (1 - Q Q^T)    H (N, I), L L^T = g g^T

Z and H are independent standard normal. Z is, because Q has orthonormal columns. What E holds
beside the space of x is independent of Z, and the backward alone reads it, which tells its rows by
their products with one another. So both have, jointly and exactly, the distribution that a drawn E
gives them, for N (O + I) values instead of O I. It is no case for noise that is read a third time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def saves(rows: int, outputs: int, inputs: int) -> bool:
    """Whether so few rows draw less than half of what the weights have elements."""
    return 2 * rows * (outputs + inputs) < outputs * inputs and rows <= min(outputs, inputs)


def read(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """What inputs read of the noise.

    Args:
        x: (N, I), N <= I.
        z: (N, O) standard normal.

    Returns:
        ``x E^T`` (N, O), and the basis ``Q^T`` (N, I) for :func:`read_back`.
    """
    q, r = torch.linalg.qr(x.mT)
    return r.mT @ z, q.mT


def read_back(g: Tensor, basis: Tensor, z: Tensor, draw: Tensor) -> Tensor:
    """What gradients read of the same noise: ``g E`` (N, I).

    Args:
        g: (N, O), N <= O, with the noise's scale for each output in it.
        basis, z: of :func:`read`.
        draw: (N, I) standard normal.
    """
    fresh = _root(g) @ draw
    known = g @ z.mT
    return fresh.addmm_(known.sub_(fresh @ basis.mT), basis)


def _root(g: Tensor) -> Tensor:
    """``L`` with ``L L^T = g g^T``, (N, N)."""
    root, failed = torch.linalg.cholesky_ex(g @ g.mT)
    if bool(failed):  # rows that depend on one another, or zeros
        return torch.linalg.qr(g.mT, mode="r").R.mT
    return root
