"""What the tables of recipes/README.md are made with: one command each, under a time budget.

conversion  teach a base to recall, convert it, compare what is kept, train it back
scratch     dense, window, random and SparseK from random weights, then at longer lengths
speed       a training step of a 1B shape, sparse beside dense
tuning      what trains a conversion back, beside controls trained alike
budgets     loss and recall by budget, position, depth and length
cost        what a layer's parts cost, by length and by k
ruler       RULER's needle tasks under all policies, after learning their wording
ablations   calibration with one thing changed at a time
plots       figures of the results of all of these
scorers     keys and values in place of the hidden state
session     clock, record and guard of an experiment's phases
suite       perplexity and recall of one checkpoint under every policy
"""
