"""The operators, one module per kind; importing a module registers its operators."""
