"""Which schedule to train next."""

from pwff_opt.search.search import (
    Certificate,
    Evolution,
    Reference,
    Searcher,
    Surrogate,
    candidates,
    features,
    kinds,
    objectives,
)

__all__ = [
    "Certificate",
    "Evolution",
    "Reference",
    "Searcher",
    "Surrogate",
    "candidates",
    "features",
    "kinds",
    "objectives",
]
