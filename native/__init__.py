"""C that is compiled for a worker's processor: how it gets built, kept and found. The sources lie
with what calls them."""
