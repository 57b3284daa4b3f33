"""What the general rules of `tiny` cannot know: by model type, other configs, classes and inputs."""

from collections.abc import Callable
from typing import Any

VOCABULARY = 128
FIRST_ID = 64  # random ids lie above, special tokens below
WIDTH = 32

# Fields that are set in every config of this type, wherever it stands.
CONFIGS: dict[str, dict[str, Any]] = {}
# Whole configs, for types whose class needs arguments.
MODELS: dict[str, Callable[[], Any]] = {}
# Classes to try before those of the auto mappings.
CLASSES: dict[str, list[str]] = {}
# Inputs from the model's config.
INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {}
# Types that run only without fused attention.
EAGER: set[str] = set()
