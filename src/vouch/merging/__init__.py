"""Several networks made one without their training data: merging of weights, and correction of what it distorts."""
