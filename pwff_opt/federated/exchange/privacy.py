"""Differential privacy of a whole device's data: clipped updates, noise on their mean, and its cost."""

from __future__ import annotations

import math
from types import ModuleType

import torch

from pwff_opt.errors import TrainingError
from pwff_opt.federated.exchange.uploads import require_finite
from pwff_opt.federated.model.blocks import Tensors
from pwff_opt.rng import stream


def clip(update: Tensors, norm: float) -> tuple[Tensors, float]:
    r"""Return a device's update with a Euclidean norm of at most ``norm``, and the norm it had.

    .. math:: \Delta \min(1, C / \|\Delta\|_2)

    over all tensors together (McMahan et al., ICLR 2018, "flat clipping"). An update within the bound
    is returned as it is. One that is not finite is a TrainingError: no factor would bound it.
    """
    if not norm > 0:
        raise TrainingError(f"the clipping norm must be greater than 0, got {norm:g}")
    require_finite(update)
    length = math.hypot(
        *(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in update.values())
    )
    if length <= norm:
        return update, length
    # Rounding to float32 lengthens by up to 2^-24; a bound that privacy rests on must hold after it.
    factor = norm / length * (1 - 2**-23)
    return {name: (t.double() * factor).float() for name, t in update.items()}, length


def add_noise(
    mean: Tensors,
    *,
    noise_multiplier: float,
    clip_norm: float,
    participants: int,
    seed: int,
    round: int,
) -> Tensors:
    r"""Return the equally weighted mean of clipped updates with Gaussian noise on every element.

    .. math:: \bar\Delta + \mathcal N(0, (z C / n)^2 I)

    with the noise multiplier z, the clipping norm C and n = ``participants``: standard deviation z C
    on the sum (McMahan et al., ICLR 2018, algorithm 1, whose estimator divides by a fixed number).
    The draw is keyed by seed and round, in the order of names. That repeats a simulation to the bit; a
    server in service must draw from a secret source instead, for noise that can be redrawn hides
    nothing.
    """
    if noise_multiplier == 0:
        return mean
    rng = stream(seed, "privacy", round=round)
    std = noise_multiplier * clip_norm / participants
    noisy: Tensors = {}
    for name in sorted(mean):
        drawn = torch.from_numpy(rng.normal(0.0, std, mean[name].shape)).to(mean[name].device)
        noisy[name] = (mean[name].double() + drawn).float()
    return noisy


def spent_epsilon(
    *,
    noise_multiplier: float,
    rounds: int,
    devices_per_round: int,
    devices: int,
    delta: float,
) -> float:
    r"""Return the epsilon such that the shared blocks of all rounds are (epsilon, delta)-private.

    Neighbours are data sets in which **one device is replaced by another** (the number of devices is
    public). Replacing one of the clipped updates moves their sum by up to 2 C, so noise of standard
    deviation z C on the sum has z / 2 times the sensitivity, which is what the accountants ask for.

    - All devices every round (``devices_per_round`` 0 or ``devices``): T Gaussian mechanisms are
      exactly one with z / (2 sqrt T) (Dong, Roth and Su, JRSS B 2022), whose least epsilon is known
      (Balle and Wang, ICML 2018).
    - A fixed number drawn without replacement: Rényi accounting (Wang, Balle and Kasiviswanathan,
      AISTATS 2019, theorem 27). That bound is loose where most devices are drawn; drawing never costs
      more than taking all, so the lesser of the two is returned.

    It covers what the server sends out. What it receives it must be trusted with, and blocks that a
    device keeps to itself are not released. Uses `dp-accounting` (Google), the extra ``privacy``.
    """
    if not 0 <= devices_per_round <= devices:
        raise TrainingError(
            f"devices_per_round must be within 0 and devices ({devices}), got {devices_per_round}"
        )
    if rounds == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    library = _accounting()
    sigma = noise_multiplier / 2
    of_all = float(library.get_epsilon_gaussian(sigma / math.sqrt(rounds), delta))
    if devices_per_round in (0, devices):
        return of_all
    accountant = library.rdp.RdpAccountant(
        neighboring_relation=library.NeighboringRelation.REPLACE_ONE
    )
    drawn = library.SampledWithoutReplacementDpEvent(
        source_dataset_size=devices,
        sample_size=devices_per_round,
        event=library.GaussianDpEvent(noise_multiplier=sigma),
    )
    accountant.compose(drawn, rounds)
    return min(of_all, float(accountant.get_epsilon(delta)))


def _accounting() -> ModuleType:
    """Import the accountant, or say how to install it."""
    try:
        import dp_accounting
    except ImportError as error:
        raise TrainingError(
            "the accountant of aggregation.noise_multiplier needs dp-accounting; "
            "install it with: pip install 'pwff-opt[privacy]'"
        ) from error
    module: ModuleType = dp_accounting
    return module
