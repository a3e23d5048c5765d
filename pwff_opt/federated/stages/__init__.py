"""What can be learned: a module a stage, with its facts; plug-ins derive from :class:`StageVariant`."""

from pwff_opt.federated.stages._stage import StageVariant

__all__ = ["StageVariant"]
