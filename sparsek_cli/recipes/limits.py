"""Where numbers stop meaning anything: beyond them, work would spin or ask for all memory."""

LARGEST = 1e30  # of rates, weights and times; twice as much in float32 is still a number
MOST_COUNTED = 1 << 48  # steps, tokens, samples: sums of them fit into numbers
LONGEST = 1 << 24  # tokens of a sequence, a prompt or a document
# Slots per KV head that a config.json may name: "never evict" is written as a number no text has,
# and what a cache of them takes is compared with the memory. More than this overflows int32.
MOST_SLOTS = (1 << 31) - 1
MOST_SEQUENCES = 1 << 16  # side by side
MOST_OF_A_STEP = 1 << 20  # sequences
MOST_HEADS = 1 << 12
MOST_WORKERS = 1 << 8  # processes that prepare data
MOST_FACTS = 1 << 12  # of a generated document, and questions about it
MOST_UNITS = 1 << 16  # of a scorer's hidden layer
