r"""Reward models: what people prefer along one axis, learned from pairs of answers.

.. math:: P(y_1 \succ y_2 \mid x) = \sigma\big(r(x, y_1) - r(x, y_2)\big), \qquad
          r(x, y) = \frac{u(x, y) - u_0}{\tau}

(Bradley and Terry 1952).  ``u``: an encoder that reads prompt and answer, with blocks and a head of one
output, trained by :math:`-\ln\sigma(u(x, y_+) - u(x, y_-))`.  The temperature :math:`\tau` is fitted on
pairs that the model has not learned from, so that a difference of rewards is a log-odds, which is what the
losses of alignment take it for; :math:`u_0` makes their mean reward zero.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit
from torch.nn import functional
from transformers import AutoTokenizer

from pwff_opt.costs import Architecture
from pwff_opt.data.models import model_config
from pwff_opt.errors import ModelError
from pwff_opt.federated.learning.cohort import Cohort
from pwff_opt.federated.learning.stage import Loss, Plain
from pwff_opt.federated.model.backbone import Backbone, Stack, pad_token_id
from pwff_opt.federated.model.blocks import Tensors, fresh_adapter, fresh_head, fresh_lora
from pwff_opt.federated.model.passes import Passes
from pwff_opt.federated.model.workers import one_thread_each
from pwff_opt.federated.text.tokens import Indices, Tokens, by_length
from pwff_opt.registry import FAMILIES
from pwff_opt.rng import stream
from pwff_opt.runs.identity import REWARDS_VERSION
from pwff_opt.runs.records import write_atomically
from pwff_opt.scenario import Training

FloatArray = NDArray[np.float64]
logger = logging.getLogger(__name__)

BATCH = 16
"""Pairs of a step."""
RANK, WIDTH, SCALE = 8, 16, 2.0
"""LoRA and bottleneck adapters of all layers."""
MAX_TOKENS = 96
BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """Preference pairs of one axis, as texts."""

    prompts: tuple[str, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        return hashlib.sha256(
            json.dumps([self.prompts, self.chosen, self.rejected]).encode()
        ).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """How well a reward model tells answers apart that it has not learned from."""

    pairs: int
    accuracy: float
    """Share of pairs whose chosen answer has the higher reward."""
    log_loss: float
    """Mean of -ln P(chosen over rejected); ln 2 = 0.693 knows nothing."""
    calibration_error: float
    """Mean distance between how sure it is and how often it is right, over ten equal bins of sureness."""


class RewardModel:
    """Rewards of answers to prompts along one axis.

    Parameters
    ----------
    reader : the encoder that reads them; several reward models share it.
    blocks, offset, temperature : what was learned.
    reliability : on pairs that nothing was learned from.
    """

    def __init__(
        self,
        reader: Reader,
        blocks: Tensors,
        *,
        offset: float,
        temperature: float,
        reliability: Reliability,
    ) -> None:
        self._reader, self._blocks = reader, blocks
        self.offset, self.temperature, self.reliability = offset, temperature, reliability

    def rewards(self, prompts: Sequence[str], answers: Sequence[str]) -> FloatArray:
        """Return the reward of each answer to the prompt at its place."""
        return (
            self._reader.scores(self._blocks, prompts, answers) - self.offset
        ) / self.temperature

    @classmethod
    def of(
        cls,
        reader: Reader,
        learn: Pairs,
        calibrate: Pairs,
        check: Pairs,
        *,
        steps: int,
        seed: int,
        folder: Path,
    ) -> RewardModel:
        """Return the reward model of some pairs, from ``folder`` if it was trained before.

        ``calibrate`` fits the temperature, ``check`` measures the reliability.
        """
        identity = {
            "version": REWARDS_VERSION,
            "reader": reader.identity,
            "pairs": [part.digest for part in (learn, calibrate, check)],
            "steps": steps,
            "seed": seed,
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        path = folder / f"{key}.safetensors"
        found = _load(path)
        if found is None:
            # How many cores there are must not show in rewards: over many steps, a sum that is split
            # otherwise makes another model.
            with one_thread_each():
                blocks = reader.learned(learn, steps=steps, seed=seed)
                found = blocks, _calibrated(reader, blocks, calibrate, check)
            _save(path, *found)
        blocks, told = found
        return cls(
            reader,
            blocks,
            offset=told["offset"],
            temperature=told["temperature"],
            reliability=Reliability(**told["reliability"]),
        )


class Reader:
    """An encoder that reads a prompt with an answer.

    Parameters
    ----------
    source : folder or hub name.
    dtype : of the frozen weights.
    """

    def __init__(self, source: str, *, dtype: str = "float32") -> None:
        family = Architecture.from_config(model_config(source), classes=1).family
        pooling = "mean" if "mean" in FAMILIES[family].poolings else "model"
        self._limit = min(
            MAX_TOKENS, model_config(source).get("max_position_embeddings", MAX_TOKENS)
        )
        self.backbone = Backbone(
            source, family=family, classes=1, pooling=pooling, max_tokens=self._limit, dtype=dtype
        )
        self._tokenizer = AutoTokenizer.from_pretrained(source)
        self._lock = threading.Lock()
        self._pad_id = pad_token_id(source)
        self.identity = [_contents(source), dtype]

    def read(self, prompts: Sequence[str], answers: Sequence[str]) -> Tokens:
        with self._lock:  # where it is told to cut, no other thread may be using it
            encoded = self._tokenizer(
                list(prompts), list(answers), truncation=True, max_length=self._limit
            )["input_ids"]
        return Tokens(
            ids=np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded]),
            offsets=np.cumsum([0, *map(len, encoded)]).astype(np.int64),
            pad_id=self._pad_id,
        )

    def scores(self, blocks: Tensors, prompts: Sequence[str], answers: Sequence[str]) -> FloatArray:
        """Return u(x, y), [answer]."""
        tokens = self.read(prompts, answers)
        found = np.zeros(len(tokens))
        passes = Passes(self.backbone, [0], self._stack(blocks))
        with torch.inference_mode():
            for batch in by_length(tokens, np.arange(len(tokens))):
                packed, hidden = passes.own(tokens, [batch])
                logits = self.backbone.classify(hidden, packed, passes.stack)
                found[batch] = logits[:, 0].double().cpu().numpy()
        return found

    def learned(self, pairs: Pairs, *, steps: int, seed: int) -> Tensors:
        """Return blocks trained on the pairs, drawn without replacement, again and again."""
        count = len(pairs)
        tokens = self.read(pairs.prompts * 2, pairs.chosen + pairs.rejected)
        size = min(BATCH, count)
        blocks = fresh_head(self.backbone.head_shapes, seed=seed)
        for layer in range(self.backbone.layer_count):
            blocks |= fresh_adapter(layer, hidden=self.backbone.hidden, width=WIDTH, seed=seed)
            shapes = self.backbone.lora_shapes(layer)
            blocks |= fresh_lora(layer, RANK, shapes, seed=seed, round=0, device=0)
        cohort = Cohort(
            self.backbone,
            _Ranking(self.backbone, tokens),
            [blocks],
            [SCALE],
            common_scale=1.0,
            passes=lambda stack: Passes(self.backbone, [0], stack),
            training=Training(batch_size=size),
            wishes=np.ones((1, 1)),
            learns=lambda _: True,
        )
        drawn = _epochs(count, size, stream(seed, "rewards"))
        (learned,) = cohort.train([[next(drawn) for _ in range(steps)]], seed=seed, round=0)
        return learned.blocks

    def _stack(self, blocks: Tensors) -> Stack:
        return Stack([{n: t.to(self.backbone.device) for n, t in blocks.items()}], [SCALE])


def _contents(source: str) -> str:
    """Return a hub name as it is, a folder by what its files hold: it may hold another model tomorrow."""
    folder, total = Path(source), hashlib.sha256()
    if not folder.is_dir():
        return source
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with path.open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def _epochs(count: int, size: int, rng: np.random.Generator) -> Iterator[Indices]:
    """Yield batches of ``size`` of ``count`` things, none twice before all have come."""
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


class _Ranking(Plain):
    """Bradley-Terry: sequences i and count + i are the chosen and the rejected answer of pair i."""

    def __init__(self, backbone: Backbone, tokens: Tokens) -> None:
        super().__init__(tokens)
        self._backbone = backbone

    def sequences(self, examples: Indices) -> Indices:
        return np.stack([examples, examples + len(self.tokens) // 2], 1).ravel()

    def losses(self, batches: Sequence[Indices], passes: Passes) -> Iterator[Loss]:
        packed, hidden = passes.own(self.tokens, [self.sequences(batch) for batch in batches])
        scores = self._backbone.classify(hidden, packed, passes.stack)[:, 0].view(-1, 2)
        yield Loss(objective=0, each=-functional.logsigmoid(scores[:, 0] - scores[:, 1]))

    def measures(self, examples: Indices, passes: Passes) -> dict[str, float]:
        packed, hidden = passes.own(self.tokens, [self.sequences(examples)])
        scores = self._backbone.classify(hidden, packed, passes.stack)[:, 0].view(-1, 2)
        return {"accuracy": float((scores[:, 0] > scores[:, 1]).double().mean())}


def _calibrated(reader: Reader, blocks: Tensors, calibrate: Pairs, check: Pairs) -> dict[str, Any]:
    """Return offset and temperature by the first pairs, reliability on the second."""
    chosen, rejected = _scored(reader, blocks, calibrate)
    if not np.isfinite([chosen, rejected]).all():
        raise ModelError(
            "alignment.reward_model must give finite rewards once it has learned, got "
            f"{np.concatenate([chosen, rejected]).tolist()[:4]} for the first held-out answers; "
            "choose another, or base_dtype 'float32'"
        )
    temperature = fitted_temperature(chosen - rejected)
    chosen_too, rejected_too = _scored(reader, blocks, check)
    found = reliability((chosen_too - rejected_too) / temperature)
    return {
        "offset": float(np.concatenate([chosen, rejected]).mean()),
        "temperature": temperature,
        "reliability": asdict(found),
    }


def _scored(reader: Reader, blocks: Tensors, pairs: Pairs) -> tuple[FloatArray, FloatArray]:
    return (
        reader.scores(blocks, pairs.prompts, pairs.chosen),
        reader.scores(blocks, pairs.prompts, pairs.rejected),
    )


def fitted_temperature(differences: FloatArray) -> float:
    """Return the temperature by which chosen minus rejected scores are the likeliest log-odds.

    Of n pairs one more is taken to be preferred either way, so that pairs which are all told apart do not
    make it sure of everything (Platt 1999, section 2.2).
    """
    right = (len(differences) + 1) / (len(differences) + 2)

    def surprise(log: float) -> float:
        odds = differences * np.exp(-log)
        return float(-(right * log_expit(odds) + (1 - right) * log_expit(-odds)).mean())

    found = minimize_scalar(surprise, bounds=(np.log(1e-3), np.log(1e3)), method="bounded")
    return float(np.exp(found.x))


def reliability(differences: FloatArray) -> Reliability:
    """Return how well differences of rewards, chosen minus rejected, foretell what people chose."""
    sureness = expit(np.abs(differences))
    right = differences > 0
    bins = np.minimum(((sureness - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [
        abs(sureness[bins == n].mean() - right[bins == n].mean()) * (bins == n).mean()
        for n in np.unique(bins)
    ]
    return Reliability(
        pairs=len(differences),
        accuracy=float(right.mean()),
        log_loss=float(-log_expit(differences).mean()),
        calibration_error=float(sum(gaps)),
    )


def _save(path: Path, blocks: Tensors, told: dict[str, Any]) -> None:
    metadata = {"told": json.dumps(told)}
    write_atomically(path, lambda target: save_file(blocks, target, metadata=metadata))


def _load(path: Path) -> tuple[Tensors, dict[str, Any]] | None:
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["told"])
            # Copies, for the sake of their place in memory: see load_checkpoint.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, told  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, KeyError, ValueError, TypeError):
        return None
