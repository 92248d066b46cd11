"""Per-head budgets, and the map and slope that go with them.

held_out      errors of a layer's candidates on held-out documents
choice        the outcome: maps, slopes and budgets of a layer's heads
by_error      one total of slots over all heads, by errors
by_threshold  the same by one threshold on the attention that pairs will get
decide        the decision: proposals compared by what the whole model loses
refine        the best of them moved in small steps
"""
