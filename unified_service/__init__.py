"""The unified role: both phases on one worker, for one GPU or where no pair is free."""
