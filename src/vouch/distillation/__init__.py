"""What other networks know, in one: ensembles distilled, and learning from prediction services."""
