"""What each KV head gets.

choice        the outcome: maps, slopes and slots of a layer's heads
by_error      one total of slots over all heads, by errors
by_threshold  the same by one threshold on the attention that pairs will get
decide        each head's slots, map and slope
compare       decisions compared by what the whole model loses
"""
