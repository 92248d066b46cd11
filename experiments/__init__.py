"""What the tables of docs/results are made with: one command each, under a time budget.

conversion  teach a base to recall, convert it, compare what is kept, train it back
scratch     dense, window, random and SparseK from random weights, then at longer lengths
adapt       ceilings, training that closes the gap, its controls and the bars
tuning      what trains a conversion back, beside controls trained alike
budgets     loss and recall by budget, position, depth and length
ruler       RULER's needle tasks under all policies, after learning their wording
ablations   calibration with one thing changed at a time
plots       figures of the results of all of these
ceiling     what selection alone could reach, seeing what comes
cached      8-bit slots; YaRN and positions by slot order beyond the trained length
long_reading  memory and time of a million tokens, a long conversation
variants    other scorers, outputs nearer to dense ones in closed form, a further loss
steps       sparsek's own commands as phases of an experiment
suite       perplexity and recall of one checkpoint under every policy
"""
