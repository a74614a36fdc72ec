"""Options and budgets fitted to a model and to the prompts of a user."""
