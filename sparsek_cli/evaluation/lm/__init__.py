"""How lm-eval's requests are answered: prefill, generation, likelihoods, and proof of what ran."""
