"""The idea: samples as one tree, who sees whom in it, and rows for a model. Needs torch and numpy alone."""
