"""A model's folder, its card, and its way to the Hub."""
