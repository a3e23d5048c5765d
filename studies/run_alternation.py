r"""How far from the optimum does block-alternating optimisation end?

The literature splits the least-energy problem (FDMA, round ``T`` given) into blocks and optimises
them in turn until nothing changes.  Two splits are run, every block solved exactly, from four
starts, on random cells, against the certified optimum of ``pwff_solvers.allocation.solve``:

``published`` (Yang et al., IEEE TWC 2021, arXiv 1911.02417; there the local accuracy is a variable
as well, here it is given)
    times for given bandwidth, power and frequency; then bandwidth, power and frequency for given
    times.  Energy ``p t`` rises with t, so the first block makes the rate constraint tight, where
    the second leaves it: the times never move again and the start decides.
``wide``
    bandwidth and power for given times; then times, power and frequency for given bandwidth.  The
    problem is convex in (bandwidth, time) together, so this one goes to the optimum pass by pass,
    except where the power limit, which ties a device's two variables together, slows or stops it.

Starts (bandwidth rules at full power, so upload times as short as that bandwidth allows):

* ``longest``: equal bandwidth, uploads as long as computing at full speed allows;
* ``half``: equal bandwidth, uploads of half the round;
* ``payload``: bandwidth in proportion to the payload, full power;
* ``inverse_gain``: bandwidth in proportion to the inverse gain, full power.

A rule may leave a device too little bandwidth for the round; it then gets the least it needs and
the rule shares out the rest (``repaired`` counts these cells).

Run ``python studies/run_alternation.py --out runs/alternation`` (about a minute); it writes
``alternation.csv`` (a row a cell, devices, blocks and start: ``gap`` = energy / optimum - 1),
``passes.csv`` (quantiles of the gap after each pass) and ``run.json``, and prints a summary.
``studies/fig_alternation.py`` draws it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import lambertw

from pwff_opt.runs.records import RunFolder
from pwff_solvers.allocation import (
    Batch,
    LeastEnergy,
    Shortest,
    Status,
    solve,
)

BLOCKS = ("published", "wide")
STARTS = ("longest", "half", "payload", "inverse_gain")
ROUND_FACTORS = (1.2, 1.5, 2.0, 3.0, 5.0, 10.0)
_BISECTIONS = 60


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cells:
    """Cells in the symbols of the problem: [cell, device]; ``B``, ``T`` [cell, 1]."""

    batch: Batch
    a: np.ndarray  # payload (nat)
    g: np.ndarray  # gain over noise density (Hz/W)
    P: np.ndarray  # largest power (W)
    c: np.ndarray  # work (cycles)
    kappa: np.ndarray
    t_max: np.ndarray  # longest upload (s)
    B: np.ndarray
    T: np.ndarray


def random_cells(count: int, devices: int, rng: np.random.Generator) -> Cells:
    """Gains over three decades, payloads and works over one; 1.2 to 10 times the shortest round."""
    shape = (count, devices)
    batch = Batch(
        payload_bit=rng.uniform(2e5, 2e6, shape),
        work_cycles=rng.uniform(1e9, 1e10, shape),
        gain=10.0 ** rng.uniform(-12.0, -9.0, shape),
        power_max_w=0.2,
        frequency_min_hz=0.0,
        frequency_max_hz=2e9,
        kappa=1e-28,
        bandwidth_hz=2e6,
        noise_psd_w_per_hz=4e-21,
    )
    round_s = solve(batch, Shortest()).round_s * rng.choice(ROUND_FACTORS, count)
    T = round_s[:, None]
    return Cells(
        batch=batch,
        a=batch.payload_bit * np.log(2.0),
        g=batch.gain / batch.noise_psd_w_per_hz[:, None],
        P=batch.power_max_w,
        c=batch.work_cycles,
        kappa=batch.kappa,
        t_max=T - batch.work_cycles / batch.frequency_max_hz,
        B=batch.bandwidth_hz[:, None],
        T=T,
    )


def energy_j(cells: Cells, b: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Energy [cell] at bandwidths and upload times; frequency and power as low as they allow."""
    send = b * t * np.expm1(cells.a / (b * t)) / cells.g
    return (send + cells.kappa * cells.c**3 / (cells.T - t) ** 2).sum(axis=1)


def least_bandwidth(cells: Cells, t: np.ndarray) -> np.ndarray:
    """Bandwidth with ``b log(1 + P g/b) = a/t``: what time ``t`` takes at full power."""
    rho = cells.a / (t * cells.P * cells.g)
    y = -lambertw(-rho * np.exp(-rho), -1).real / rho - 1.0  # log(1 + y) = rho y
    return cells.P * cells.g / y


def times_tight(cells: Cells, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Best times for given bandwidth and power: energy ``p t`` rises with t, so the shortest."""
    return cells.a / (b * np.log1p(p * cells.g / b))


def times_joint(cells: Cells, b: np.ndarray) -> np.ndarray:
    """Best times, power and frequency for given bandwidth: bisection on dE/dt."""
    low = np.minimum(times_tight(cells, b, cells.P), cells.t_max)
    high = cells.t_max
    for _ in range(_BISECTIONS):
        t = (low + high) / 2
        z = cells.a / (b * t)
        rising = 2 * cells.kappa * (cells.c / (cells.T - t)) ** 3 > b / cells.g * (
            np.expm1(z) * (z - 1) + z
        )
        low, high = np.where(rising, low, t), np.where(rising, t, high)
    return (low + high) / 2


def bandwidths(cells: Cells, t: np.ndarray) -> np.ndarray:
    """Best bandwidth and power for given times: bisection on the log price of bandwidth.

    ``1 + (z-1) e^z = price g/t`` gives ``z = 1 + W((price g/t - 1)/e)``, then ``b = a/(t z)``, at
    least :func:`least_bandwidth`.
    """
    floor = least_bandwidth(cells, t)
    log_gt = np.log(cells.g / t)

    def demand(log_lam: np.ndarray) -> np.ndarray:
        z = 1 + lambertw((np.exp(log_lam + log_gt) - 1) / np.e).real
        return np.maximum(floor, cells.a / (t * z))

    def log_price(b: np.ndarray) -> np.ndarray:  # at which each device would take b
        z = cells.a / (t * b)
        return np.log(np.expm1(z) * (z - 1) + z) - log_gt

    # between the prices at which some device wants all of B, and none more than the least it needs
    low = log_price(cells.B).min(axis=1, keepdims=True)
    high = log_price(floor).max(axis=1, keepdims=True)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        over = demand(middle).sum(axis=1, keepdims=True) > cells.B
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    b = demand(high)
    return b * np.minimum(1.0, cells.B / b.sum(axis=1, keepdims=True))  # the last bits of B


def shared_out(cells: Cells, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bandwidth in proportion to ``weight`` but enough for the round; and which cells needed that."""
    floor = least_bandwidth(cells, cells.t_max)
    rule = cells.B * weight / weight.sum(axis=1, keepdims=True)
    low, high = np.zeros_like(cells.B), np.ones_like(cells.B)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        over = np.maximum(floor, middle * rule).sum(axis=1, keepdims=True) > cells.B
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    return np.maximum(floor, high * rule), (rule < floor).any(axis=1)


def start_times(cells: Cells, start: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bandwidths, upload times and ``repaired`` [cell] of a start."""
    weight = {"payload": cells.a, "inverse_gain": 1 / cells.g}.get(start, np.ones_like(cells.a))
    b, repaired = shared_out(cells, weight)
    shortest = np.minimum(times_tight(cells, b, cells.P), cells.t_max)
    if start == "longest":
        return b, cells.t_max, repaired
    if start == "half":
        return b, np.clip(cells.T / 2, shortest, cells.t_max), repaired
    return b, shortest, repaired


def alternate(cells: Cells, blocks: str, start: str, passes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the energy after the start and after each block [2 passes + 1, cell]; and repaired."""
    b, t, repaired = start_times(cells, start)
    energies = [energy_j(cells, b, t)]
    for _ in range(passes):
        b = bandwidths(cells, t)
        energies.append(energy_j(cells, b, t))
        power = b * np.expm1(cells.a / (b * t)) / cells.g
        t = times_joint(cells, b) if blocks == "wide" else times_tight(cells, b, power)
        energies.append(energy_j(cells, b, t))
    return np.array(energies), repaired


def run(
    out: str | Path, *, devices: tuple[int, ...], cells: int, passes: int, seed: int
) -> pd.DataFrame:
    """Compute the study into the run folder ``out``; return ``alternation.csv``."""
    folder = RunFolder(out)
    folder.begin(study="alternation", devices=list(devices), cells=cells, passes=passes, seed=seed)
    rows, traces = [], []
    for count in devices:
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(count,)))
        drawn = random_cells(cells, count, rng)
        optimum = solve(drawn.batch, LeastEnergy(drawn.T[:, 0]))
        if (optimum.status != Status.OPTIMAL).any():
            raise RuntimeError(
                f"{(optimum.status != Status.OPTIMAL).sum()} cells are not certified"
            )
        for blocks in BLOCKS:
            for start in STARTS:
                energies, repaired = alternate(drawn, blocks, start, passes)
                gaps = energies[::2] / optimum.energy_j - 1
                rows.append(
                    pd.DataFrame(
                        {
                            "devices": count,
                            "blocks": blocks,
                            "start": start,
                            "cell": np.arange(cells),
                            "round_s": drawn.T[:, 0],
                            "optimum_j": optimum.energy_j,
                            "repaired": repaired,
                            "gap_first_pass": gaps[min(1, passes)],
                            "gap": gaps[-1],
                            "change_last_pass": energies[-1] / energies[-3] - 1,
                        }
                    )
                )
                quantiles = np.quantile(gaps, [0.25, 0.5, 0.75, 1.0], axis=1)
                names = ("gap_lower_quartile", "gap_median", "gap_upper_quartile", "gap_worst")
                traces.append(
                    pd.DataFrame(
                        {"devices": count, "blocks": blocks, "start": start}
                        | {"after_pass": np.arange(passes + 1)}
                        | dict(zip(names, quantiles, strict=True))
                    )
                )
    table = pd.concat(rows, ignore_index=True)
    folder.write_table("alternation.csv", table)
    folder.write_table("passes.csv", pd.concat(traces, ignore_index=True))
    folder.finish("done")
    return table


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return median, quartiles and worst gap in per cent, by blocks, start and devices."""
    gap = 100 * table.set_index(["blocks", "start", "devices"])["gap"]
    found = gap.groupby(level=[0, 1, 2], sort=False).quantile([0.25, 0.5, 0.75, 1.0]).unstack()
    found.columns = pd.Index(["lower quartile", "median", "upper quartile", "worst"])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="block alternation against the certified optimum")
    parser.add_argument("--out", default="runs/alternation")
    parser.add_argument("--devices", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    result = run(
        given.out,
        devices=tuple(given.devices),
        cells=given.cells,
        passes=given.passes,
        seed=given.seed,
    )
    print("gap to the optimum (per cent)")
    print(summary(result).to_string(float_format=lambda value: f"{value:.3g}"))
