"""What stages learn by: examples -> losses -> measures, and the steps of many devices side by side."""

from pwff_opt.federated.learning.classification import Classification
from pwff_opt.federated.learning.language import Causal, Language, Masked
from pwff_opt.federated.learning.stage import Lesson, Loss, Stage

__all__ = ["Causal", "Classification", "Language", "Lesson", "Loss", "Masked", "Stage"]
