"""The only room that composes: model, data, scores, plan, training, search, export."""
