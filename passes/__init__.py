"""The verbs of sarac: each pass takes a ModelGraph and returns one that computes the same."""

if __name__ != "sarac.passes":
    raise ImportError(f"This folder is sarac.passes, not {__name__}: write `from sarac.passes import …`.")
