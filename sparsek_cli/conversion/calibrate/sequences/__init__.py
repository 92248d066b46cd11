"""What calibration reads.

texts           a file, a data set, or prose that every machine has
sequence        one sequence: a context, and turns that go on from its end
build           the sequences of a run: text, and documents with questions
reconstruction  documents that are told again from their own text
"""
