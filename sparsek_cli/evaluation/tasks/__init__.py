"""What is asked of a model: RULER, SCROLLS, recall, perplexity, and lm-eval's own tasks."""
