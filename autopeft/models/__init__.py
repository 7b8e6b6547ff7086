"""Pre-trained models: from a specification to a module, its sites and its dataflow."""
