"""The compatibility fingerprint: what two workers must share, in words.

Words and not a hash, so that whoever refuses a worker can say in what it differs.
"""


def make_fingerprint(**facts: str | int) -> str:
    """`name:value` of each fact, in the order given. Raises ValueError for a value that holds a
    separator."""
    for name, value in facts.items():
        if set(str(value)) & {":", ","}:
            raise ValueError(f"{name} {value!r} holds a separator")
    return ",".join(f"{name}:{value}" for name, value in facts.items())


def difference(ours: str, theirs: str) -> str:
    """The facts that differ, "dtype is float32, not bfloat16", ours first; both fingerprints whole
    where they are not made of the same facts."""
    mine, others = _facts(ours), _facts(theirs)
    if not mine or mine.keys() != others.keys():
        return f"{ours} and {theirs}"
    return "; ".join(
        f"{name} is {value}, not {others[name]}"
        for name, value in mine.items()
        if value != others[name]
    )


def _facts(fingerprint: str) -> dict[str, str]:
    pairs = [fact.partition(":") for fact in fingerprint.split(",")]
    return {name: value for name, _, value in pairs} if all(pair[1] for pair in pairs) else {}
