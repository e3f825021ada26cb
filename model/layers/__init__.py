"""Tables, interactions, optimisers of tables."""
