"""Which schedule to train next.

Methods are in :mod:`pwff_opt.search.methods`; a method that another package adds is one too.
"""
