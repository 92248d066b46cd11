"""Where verbs may write, and how what they write appears whole or not at all."""
