"""The stages of a language model's life that a federation can go through: examples -> losses -> measures."""

from pwff_opt.federated.stages.classification import Classification
from pwff_opt.federated.stages.language import Causal, Language, Masked
from pwff_opt.federated.stages.stage import Lesson, Loss, Stage

__all__ = ["Causal", "Classification", "Language", "Lesson", "Loss", "Masked", "Stage"]
