"""Per-head budgets, and the map and slope that go with them.

choice        the outcome: maps, slopes and budgets of a layer's heads
by_error      one total of slots over all heads, by errors
by_threshold  the same by one threshold on the attention that pairs will get
decide        each head's slots, map and slope
compare       decisions compared by what the whole model loses
refine        the best of them moved in small steps
"""
