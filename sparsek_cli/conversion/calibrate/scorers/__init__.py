"""Regression from a layer's input to scores.

targets  how much later queries want each key, over blocks of queries
ridge    streamed ridge regression from inputs to targets
linear   a layer's candidate maps
mlp      the same with a hidden layer
"""
