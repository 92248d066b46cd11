"""One thin file per verb: flags in, one call down, result out."""
