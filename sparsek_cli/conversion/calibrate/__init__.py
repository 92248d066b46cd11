"""Scorers from the base's own attention: method.md section 5.

collect   one layer of the dense base at a time: inputs, queries, keys, values
targets   how much later queries want each key, over blocks of queries
maps      streamed ridge regression from inputs to targets
fit       a layer's candidate maps
mlp       the same with a hidden layer
choose    error of the attention output after W_o for a candidate's choice of keys
allot     one total of slots over all heads, by errors
threshold the same by one threshold on the attention that pairs will get
whole     what the whole model loses while some of its layers choose
decide    each head's share, map and slope
settle    decisions compared by what the whole model loses
texts     what is read: a file, a data set, or prose that every machine has
sequence  one sequence: a context, and turns that go on from its end
sequences text, and documents that need things far back
retold    documents that are told again
run       all of it, layer by layer
"""

from sparsek_cli.conversion.calibrate.run import calibrate

__all__ = ["calibrate"]
