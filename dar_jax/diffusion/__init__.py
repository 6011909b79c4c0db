"""Pure functions of a predicting function: interpolants, objective, samplers, guidance."""
