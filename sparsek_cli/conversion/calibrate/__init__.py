"""Scorers from the base's own attention: method.md section 5.

layerwise       one layer of the dense base at a time
recorded        what its attention sees of a sequence: inputs, queries, keys, values
sequences/      what is read: plain text, and documents that need things far back
scorers/        maps from a layer's input to how much later queries want each key
rows            which rows of a sequence are looked at, and for what
sensitivity/    what a choice of keys costs: a layer's output, the whole model's predictions
head_budgets/   slots, map and slope per KV head
method          what ablations settled
effort          how much of all that a device affords
layer_search    candidate maps fitted and compared, layer by layer
chosen_scorers  what is written of the maps
run             all of it
"""
