"""Access schemes: how devices share the uplink band.  One file a scheme.

A scheme is an :class:`~pwff_solvers.allocation.Access`; its name is a value of ``cell.access``.
"""
