"""The seed's scheduler: what runs next, and what memory it may take (shared/scheduling.md)."""
