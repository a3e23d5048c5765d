"""Bits a device sends in a round."""

from __future__ import annotations

from collections.abc import Sequence

from pwff_opt.costs.architecture import Architecture
from pwff_opt.costs.blocks import Blocks, adapter_parameters, check_states, head_parameters
from pwff_opt.decision import LayerState


def uplink_payload_bit(
    architecture: Architecture, blocks: Blocks, states: Sequence[LayerState]
) -> int:
    r"""Return the payload of one device's upload in a round.

    .. math:: s = \beta\,[\,|\mathcal A|\,(2hw + w + h) + \sigma\,n_\text{head}\,]

    The downlink broadcast of the averaged blocks has the same size. LoRA is personal, never sent.

    Parameters
    ----------
    architecture, blocks
        :math:`h`; :math:`w`, bits per parameter :math:`\beta` and whether the head is shared
        :math:`\sigma`.
    states
        State of every layer; :math:`\mathcal A` are the aggregated ones. [layers]

    Returns
    -------
    int
        Payload [bit]: 8 x the bytes of the tensors as safetensors stores them. The header of such a
        file is not in it: about 90 byte per tensor, measured 2,176 byte for six adapters (24
        tensors) and 144 byte for a head alone; framing is up to the protocol.

    Raises
    ------
    DecisionError
        ``states`` has not one entry per layer.
    """
    check_states(architecture, states)
    aggregated = sum(state == LayerState.AGGREGATED for state in states)
    shared = aggregated * adapter_parameters(architecture, blocks)
    shared += blocks.head_shared * head_parameters(architecture)
    return blocks.bits_per_parameter * shared
