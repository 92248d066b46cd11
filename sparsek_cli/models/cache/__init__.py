"""The cache of a converted model.

slots       the cache itself: sinks, selected pairs and the window of every layer
bytes       how much a cache holds, by arithmetic and as held
batches     sequences that decode side by side: forked, joined, coming and going
state_file  a cache saved to a file and continued
"""
