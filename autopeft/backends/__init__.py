"""The ways to put trainable parts into a model."""

BUILTIN = {
    "native": "autopeft.backends.native:Native",
}
