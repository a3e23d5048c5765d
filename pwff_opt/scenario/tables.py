"""A scenario: the cell, its devices, the model and data they fine-tune, and what may be decided.

Every table of a scenario file is one frozen dataclass here, with the same names and units. The rule
of a field stands in its type (``Annotated[float, Gt(0)]``); rules between fields stand in
``Scenario``. Both are checked whenever a scenario is made, from a file or in Python, and all
violations are reported together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from pwff_opt.errors import ScenarioError
from pwff_opt.registry import ACCESS, CHANNELS, RULES, SEARCHES, STAGES
from pwff_opt.scenario.checks import OneOf, field_problems

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Count = Annotated[int, Gt(0)]
Natural = Annotated[int, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
UploadDtype = Literal["float32", "float16", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The base station's side: one band for uploads, one for the broadcast."""

    bandwidth_hz: Positive
    """Uplink band, divided among the devices (fdma) or used by each in turn (tdma)."""
    downlink_bandwidth_hz: Positive
    downlink_power_w: Positive
    noise_psd_w_per_hz: Positive = 3.981e-21
    """-174 dBm/Hz, thermal noise at 290 K."""
    access: Annotated[str, OneOf(ACCESS)] = "fdma"


@dataclass(frozen=True, slots=True, kw_only=True)
class Radio:
    """From distance to power gain; see :mod:`pwff_opt.channel`."""

    path_loss_1km_db: NonNegative = 128.1
    path_loss_slope_db: NonNegative = 37.6
    """dB per decade of distance."""
    shadowing_std_db: NonNegative = 8.0
    fading: Annotated[str, OneOf(CHANNELS)] = "rayleigh"
    """Small-scale fading; see :mod:`pwff_opt.channel.fading`."""
    rician_factor: NonNegative = 3.0
    """Power of the direct path over that of the scattered ones (linear); only for rician."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device: where it is, what it can do, what its effort costs."""

    distance_m: Annotated[float, Gt(0), Le(1e6)]
    power_max_w: Positive
    frequency_max_hz: Positive
    frequency_min_hz: NonNegative = 0.0
    kappa: Positive = 1e-28
    """Effective switched capacitance [J s^2 / cycle]: c cycles at f Hz cost kappa c f^2."""
    flops_per_cycle: Positive = 8.0
    memory_byte: Positive = 4e9
    receive_power_w: NonNegative = 0.1
    """Power drawn while the broadcast is received."""
    helpfulness: Share = 0.5
    """Weight of helpfulness in what this device's user prefers; safety has the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The frozen language model: "minilm", a local folder, or a hub name."""

    source: str = "minilm"
    pooling: Literal["model", "mean"] = "model"
    """What the head sees: the model's own way (BERT's first token, Llama's last), or the mean."""
    max_tokens: Annotated[int, Gt(1)] = 48
    attention_window: Natural = 0
    """Sparse attention: a token sees those less than so many away, and the first ones; 0: all tokens."""
    attention_sinks: Natural = 4
    """The first tokens, which all see; only where there is a window."""
    system_prompt: str = ""
    """What the chat template is given as the system's message; only where there are prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The labelled text and how it is shared out; see :mod:`pwff_opt.data.partition`."""

    source: Literal[
        "hutto",
        "reuters-r8",
        "20newsgroups",
        "alpaca-demo",
        "stereoset",
        "file",
        "hub",
    ] = "hutto"
    path: str = ""
    """For "file": a CSV, Parquet or JSONL file, or a folder of them; for "hub": a data set's name."""
    text_column: str = "text"
    label_column: str = "label"
    prompt_column: str = "prompt"
    """This and the next: where the stage is "instruction" or "alignment"."""
    answer_column: str = "answer"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    axis_column: str = "axis"
    """Of preference pairs: "helpfulness" or "safety", what the chosen answer is better in."""
    group_column: str = ""
    """Of preference pairs: rows of one group stay in one part of the data; empty: rows of one prompt."""
    domain_column: str = ""
    """Column of the natural groups; empty: one group."""
    neutral_band: Annotated[float, Gt(0), Le(4)] = 0.5
    """Hutto only: mean ratings within +-this are "neutral"."""
    label_dirichlet: Positive = 5.0
    """Concentration of each device's class mix around its domain's; small is more skewed."""
    train_per_device: Count = 240
    validation_per_device: Count = 60
    test_per_device: Count = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Peft:
    """The trainable blocks."""

    adapter_width: Natural = 16
    """Of the bottleneck adapters; 0: none."""
    lora_scaling: Literal["constant", "standard", "rslora"] = "constant"
    """What multiplies B A of rank r: lora_scale, or alpha / r, or alpha / sqrt(r) (rank-stabilised)."""
    lora_scale: Positive = 2.0
    """Only for "constant", where it stands for alpha / r at every rank."""
    lora_alpha: Positive = 8.0
    """Only for "standard" and "rslora"."""
    common_lora_rank: Natural = 0
    """Rank of a second LoRA beside the one that decisions size, averaged over devices; 0: none."""
    head: Literal["personal", "shared"] = "personal"
    upload_dtype: UploadDtype = "float32"
    """"int8": a scale a tensor, and what rounding lost is added to the next upload (error feedback)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What every device does in a round."""

    stage: Annotated[str, OneOf(STAGES)] = "classification"
    """What is learned; see :mod:`pwff_opt.federated.stages`."""
    rounds: Count = 4
    validate_after: tuple[Count, ...] = ()
    """Rounds after which the models are validated, the last among them; empty: after every round.
    Only a schedule cut at such a round can be on the front."""
    local_steps: Count = 4
    batch_size: Count = 16
    learning_rate: Positive = 3e-3
    """Of adapters and LoRA."""
    head_learning_rate: Positive = 1e-3
    """Of the classification head."""
    weight_decay: NonNegative = 0.01
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen model where it is trained on this machine; blocks are always float32."""
    feature_cache_byte: NonNegative = 4e9
    """Memory of this machine for outputs of frozen layers; what does not fit goes to disk. It changes
    speed, never results."""
    checkpoint_byte: Positive = 2e10
    """Disk for checkpoints; those unused for longest go first. It changes speed, never results."""

    @property
    def validated(self) -> tuple[int, ...]:
        """The rounds, counted from 1, after which models are validated."""
        return self.validate_after or tuple(range(1, self.rounds + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """How a device aligns its model to its user; only where ``training.stage`` is "alignment".

    See :mod:`pwff_opt.federated.learning.alignment`. The drift from what is shared is held by
    ``aggregation.proximal``.
    """

    optimiser: Literal["dpo", "modpo", "grpo"] = "modpo"
    """Preference pairs, pairs with the other reward as a margin, or sampled answers."""
    kl: Positive = 0.1
    """Price of leaving the reference model: beta of DPO, weight of the divergence in GRPO."""
    reconcile: Literal["weighted", "mgda", "regularised"] = "regularised"
    """How the gradients of the two objectives become one step."""
    regularisation: Positive = 1.0
    """"regularised" only: pull of the gradients' weights to the user's; "mgda" has none."""
    answer_tokens: Count = 24
    """Longest sampled answer, in evaluations too."""
    answers: Annotated[int, Ge(2)] = 4
    """Sampled for every prompt (GRPO)."""
    temperature: Positive = 1.0
    """Of sampled answers (GRPO); evaluations take the likeliest token."""
    clip: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Of probability ratios (GRPO)."""
    updates: Count = 2
    """Steps on the same sampled answers (GRPO)."""
    reward_share: Annotated[float, Gt(0), Lt(1)] = 0.5
    """Of the groups of preference pairs: those the reward models learn from, and no device holds."""
    reward_model: str = "minilm"
    """Encoder that the reward models are made of: "minilm", a folder, or a hub name."""
    reward_steps: Count = 150
    """Of training a reward model, 16 pairs each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregation:
    """What the server does with the blocks of aggregated layers.

    See :mod:`pwff_opt.federated.exchange.rules`.
    The default is PWFF: adapters are averaged, LoRA is personal.
    """

    adapter: Literal["average", "personal"] = "average"
    lora: Annotated[str, OneOf(RULES)] = "personal"
    devices_per_round: Natural = 0
    """Devices drawn to take part in a round; 0: all."""
    proximal: NonNegative = 0.0
    """FedProx: half of this times the squared distance from the round's start joins the loss, for
    the blocks that are uploaded."""
    server: Literal["average", "momentum", "adam"] = "average"
    """How averages become the new shared blocks: as they are, or a step by FedAvgM or FedAdam.
    LoRA factors are among them where the rule only averages: fedit, ffa, fedsa or rolora."""
    server_learning_rate: Positive = 1.0
    server_momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    server_second_momentum: Annotated[float, Ge(0), Lt(1)] = 0.99
    """FedAdam's decay of the squared update."""
    server_adaptivity: Positive = 1e-3
    """FedAdam's tau, below which updates are not magnified."""
    clip_norm: NonNegative = 0.0
    """Largest Euclidean norm of a device's update of uploaded blocks; 0: none. The update is the change
    since the round began or, where noise is added, since what server and devices all know."""
    noise_multiplier: NonNegative = 0.0
    """Standard deviation of the Gaussian noise on the sum of clipped updates, over ``clip_norm``."""
    privacy_delta: Annotated[float, Gt(0), Le(1)] = 1e-5
    """The delta at which the spent (epsilon, delta) is reported where noise is added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What the search may choose."""

    ranks: tuple[Natural, ...] = (0, 2, 4, 8)
    rank_scope: Literal["common", "per_device"] = "common"
    layer_states: tuple[Literal["frozen", "personal", "aggregated"], ...] = (
        "frozen",
        "personal",
        "aggregated",
    )
    layer_groups: Natural = 0
    """Groups of neighbouring layers, as equal as can be, with one state each; 0: each layer its own."""
    phases: Count = 1
    """Stretches of rounds, equally long, with a decision each; 1: one decision for the whole run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What the user will accept; points beyond are left out of the front. None: no limit."""

    accuracy_min: Share | None = None
    energy_max_j: Positive | None = None
    delay_max_s: Positive | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """How the front is searched for."""

    method: Annotated[str, OneOf(SEARCHES)] = "surrogate"
    """A model of accuracy chooses what to train next, or NSGA-II does without one."""
    population: Annotated[int, Ge(4)] = 8
    """Of the first generation: plain ways to fine-tune, then random ones; of every one of "evolution"."""
    curve_points: Annotated[int, Ge(2)] = 25
    """Prices of time at which each schedule's energy-delay curve is laid down."""
    explore_every: Natural = 5
    """Of so many trainings that "surrogate" chooses, one is far from all before; 0: none is."""
    stop_early: bool = False
    """End a training after a validated round from which on, very likely, it adds nothing to the front."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeds:
    """Roots of the random streams, apart so that one can be redrawn while the others stay."""

    devices: Natural = 1
    channel: Natural = 1
    data: Natural = 1
    training: Natural = 1
    search: Natural = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A complete, checked planning problem.

    Raises
    ------
    ScenarioError
        Naming every field that breaks a rule, with the rule and the value.
    """

    cell: Cell
    devices: tuple[Device, ...]
    name: str = "scenario"
    radio: Radio = field(default_factory=Radio)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    peft: Peft = field(default_factory=Peft)
    training: Training = field(default_factory=Training)
    alignment: Alignment = field(default_factory=Alignment)
    aggregation: Aggregation = field(default_factory=Aggregation)
    decisions: Decisions = field(default_factory=Decisions)
    thresholds: Thresholds = field(default_factory=Thresholds)
    search: Search = field(default_factory=Search)
    seeds: Seeds = field(default_factory=Seeds)
    folder: str = "."
    """Where relative paths start: the folder of the scenario file."""

    def __post_init__(self) -> None:
        problems = list(field_problems(self, ""))
        try:
            problems += self._relations()
        except (TypeError, AttributeError, KeyError):  # of fields that are wrong, reported above
            if not problems:
                raise
        if problems:
            raise ScenarioError(f"scenario {self.name!r}", problems)

    def _relations(self) -> Iterator[str]:
        if not self.devices:
            yield "devices must hold at least one device, got none"
        for number, device in enumerate(self.devices):
            if device.frequency_min_hz > device.frequency_max_hz:
                yield (
                    f"devices[{number}].frequency_min_hz must not exceed frequency_max_hz "
                    f"({device.frequency_max_hz:g}), got {device.frequency_min_hz:g}"
                )
        stage = STAGES[self.training.stage]
        if self.data.source not in stage.sources:
            yield (
                f"data.source must be one of {', '.join(map(repr, stage.sources))} for training.stage "
                f"{self.training.stage!r}, got {self.data.source!r}"
            )
        if self.data.source in ("file", "hub") and not self.data.path:
            yield f"data.path must name the data for data.source {self.data.source!r}, got ''"
        if self.data.source not in ("file", "hub") and self.data.path:
            yield f"data.path must be empty for data.source {self.data.source!r}, got {self.data.path!r}"
        if self.training.local_steps * self.training.batch_size > self.data.train_per_device:
            yield (
                "training.local_steps x training.batch_size must not exceed data.train_per_device "
                f"({self.data.train_per_device}), so that a round sees no example twice; "
                f"got {self.training.local_steps} x {self.training.batch_size}"
            )
        trains = max(self.peft.adapter_width, self.peft.common_lora_rank, *self.decisions.ranks, 0)
        if not stage.classifies and not trains:
            yield (
                "peft.adapter_width, peft.common_lora_rank or a rank of decisions.ranks must be above 0 "
                f"for training.stage {self.training.stage!r}, which has no head to train; got 0 everywhere"
            )
        yield from stage.problems(self)
        yield from self._aggregation_relations()
        for key, values in (
            ("decisions.ranks", self.decisions.ranks),
            ("decisions.layer_states", self.decisions.layer_states),
        ):
            if not values or len(set(values)) != len(values):
                yield f"{key} must hold at least one value and none twice, got {list(values)!r}"
        marks = self.training.validate_after
        if marks and (list(marks) != sorted(set(marks)) or marks[-1] != self.training.rounds):
            yield (
                "training.validate_after must ascend and end with training.rounds "
                f"({self.training.rounds}), got {list(marks)!r}"
            )
        if self.decisions.phases > self.training.rounds:
            yield (
                f"decisions.phases must not exceed training.rounds ({self.training.rounds}), "
                f"got {self.decisions.phases}"
            )

    def _aggregation_relations(self) -> Iterator[str]:
        table = self.aggregation
        rule = RULES.get(table.lora)
        if table.devices_per_round > len(self.devices):
            yield (
                "aggregation.devices_per_round must not exceed the number of devices "
                f"({len(self.devices)}), got {table.devices_per_round}"
            )
        if table.noise_multiplier > 0 and table.clip_norm == 0:
            yield (
                "aggregation.clip_norm must be greater than 0 where aggregation.noise_multiplier is "
                f"({table.noise_multiplier:g}): noise is measured in it; got 0"
            )
        if table.noise_multiplier > 0 and rule and rule.aggregates and not rule.averages:
            yield (
                "aggregation.noise_multiplier must be 0 for aggregation.lora "
                f"{table.lora!r}, which does more than average; got {table.noise_multiplier:g}"
            )
        if rule and rule.equal_ranks and self.decisions.rank_scope == "per_device":
            yield (
                f"decisions.rank_scope must be 'common' for aggregation.lora {table.lora!r}, which "
                "averages factors of one and the same rank; got 'per_device'"
            )
