"""The decode role: promises memory, takes KV in through its landing window, generates."""
