"""The cache of a converted model.

slots       the cache itself, over all layers
layers      a layer of it: sinks, selected pairs and the window
bytes       how much a cache holds, by arithmetic and as held
batches     sequences that decode side by side: forked, joined, coming and going
state_file  a cache saved to a file and continued
"""
