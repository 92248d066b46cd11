"""One token for every row of a state: insertion into the slots, attention over them."""
