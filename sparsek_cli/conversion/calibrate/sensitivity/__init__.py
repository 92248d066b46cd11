"""Sensitivity: what a selection of keys costs.

output_error  of one layer's attention output, after W_o
kept_sums     the attention that is left, for a CPU
divergence    of the whole model's predictions, while some layers choose
gradient      of the sparse model: what its loss would gain or lose with other slots for a head
"""
