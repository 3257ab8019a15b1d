"""One script a stage."""
