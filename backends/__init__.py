"""The doors of sarac: one module per format in which a model leaves it or comes back."""

if __name__ != "sarac.backends":
    raise ImportError(f"This folder is sarac.backends, not {__name__}: write `from sarac.backends import …`.")
