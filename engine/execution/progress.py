"""How far a long start is, as lines: for logs and terminals alike."""


def progress_bar(what: str, done: int, of: int) -> str:
    width = 20
    full = width * done // of if of else width
    return f"{what} [{'#' * full}{'.' * (width - full)}] {done}/{of}"
