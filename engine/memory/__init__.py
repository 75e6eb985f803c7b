"""Pages of KV: who owns each, where a request's tokens lie, what a prefix tree keeps."""
