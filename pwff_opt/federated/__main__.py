"""Compile the trainer's kernels now and keep them: ``python -m pwff_opt.federated``.

Otherwise the first training does it, which takes ten seconds, once for either type of the frozen weights.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from transformers import BertConfig, BertModel

from pwff_opt.federated.model.attention import Around
from pwff_opt.federated.model.bottleneck import Bottleneck, adapted
from pwff_opt.federated.model.low_rank import LowRank
from pwff_opt.federated.text.tokens import Packed, Tokens
from pwff_opt.registry import FAMILIES
from pwff_solvers.compiled import transformer as kernels
from pwff_solvers.compiled.lanes import LANES


def main() -> None:
    """Pass forwards and backwards through one small layer of each kind."""
    if not kernels.AVAILABLE:
        print("trainer: numba is switched off, torch's own operations are used")
        return
    start = time.perf_counter()
    print("trainer: compiling its kernels (20 seconds, once)", flush=True)
    config = BertConfig(
        vocab_size=1,
        hidden_size=LANES,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=LANES,
    )
    model = BertModel(config).requires_grad_(False)
    tokens = Tokens(ids=np.zeros(8, np.int64), offsets=np.array([0, 8]), pad_id=0)
    around = Around(Packed.of(tokens, [np.array([0])]), causal=False)
    a, b = torch.zeros(1, LANES, requires_grad=True), torch.zeros(LANES, 1, requires_grad=True)
    update = LowRank(start=0, stop=8, scale=1.0, a=a, b=b)
    adapter = Bottleneck(0, 8, a, torch.zeros(1), b, torch.zeros(LANES))
    for dtype in (torch.float32, torch.bfloat16):
        layer = FAMILIES["bert"].layer(model.encoder.layer[0], config, dtype)
        x = torch.zeros(8, LANES, requires_grad=True)
        adapted(layer.run(x, around, {"query": [[update]]}), [adapter]).sum().backward()
    print(f"trainer: ready after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
