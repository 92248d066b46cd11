"""What experiments put in place of parts of the product: scorers, outputs, losses."""
